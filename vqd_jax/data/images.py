"""Pictures come in here (masks in ``masks``), and pictures to look at go out.

Reading: encoded bytes, files, and what a user gives become uint8 pixels. Cutting: the published
crops, as pure functions of the random numbers that they are given. Showing: grids and animations.

Letters: H, W height and width of an image in pixels, S side of a square image, N image tokens,
P prompts, J images of each prompt.
"""

import contextlib
import io
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from absl import logging
from PIL import Image, ImageDraw, ImageFont

from vqd_jax import files
from vqd_jax.data import encoded
from vqd_jax.errors import UserError

# What a user may give as a picture: a Pillow image, or uint8 [H, W, 3].
Picture = Image.Image | np.ndarray

# The formats of data sets. Pillow knows others, such as EPS, for which it runs an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif",
    ".ppm", ".pgm",
)  # fmt: skip
# How files of these formats begin, whatever they are called.
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*"
    rb"|P[1-6]\s|....ftypavi[fs]",
    re.DOTALL,
)
MAX_PIXELS = 100_000_000
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A caption with one of these words does not describe the mirror image.
_SIDES = {
    *("left", "lefthand", "leftmost", "leftward", "leftwards", "anticlockwise", "counterclockwise"),
    *("right", "righthand", "rightmost", "rightward", "rightwards", "clockwise"),
}
# Numbers in [0, 1) that `random_crop` takes.
NUM_UNIFORMS = 5

# Fonts with more letters than Pillow's own, by their names on Linux, macOS and Windows.
_FONTS = (
    "DejaVuSans.ttf", "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf", "arial.ttf",
    "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "NotoSansArabic-Regular.ttf",
)  # fmt: skip
_LABEL_SIZE = 15
# Pixels between the pictures of a grid.
_MARGIN = 8
# Small pictures are enlarged to about this many pixels, by a whole factor.
_SHOWN_SIDE = 96
_LABEL_HEIGHT = 26

# `decode` refuses by MAX_PIXELS. Pillow's own warning would come before that, and only once.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(data: bytes, min_side: int = 0, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The upright RGB pixels of an encoded image of any colour mode.

    The EXIF orientation is applied, 16-bit pixels are scaled to 8 bits, colours of another profile
    become sRGB, transparency is composited on white, and the first of several frames is taken.

    Args:
      data: the bytes of a JPEG, PNG, WebP, GIF, BMP, TIFF, PPM or AVIF file.
      min_side: if positive, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is faster,
        as long as neither side falls below this.
      max_pixels: a larger image is refused before it is decoded.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ValueError: with the reason: the data are empty, no image, cut short or damaged, or have more
        than ``max_pixels`` pixels or values of an unknown range.
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        encoded.require_sound(data)
        return _decoded(data, min_side, max_pixels)
    except Image.UnidentifiedImageError:
        problem = ValueError("not an image of a known format")
    # Pillow reports damage as OSError, SyntaxError, struct.error, EOFError, ...
    except Exception as error:
        problem = ValueError(str(error) or type(error).__name__)
        problem.__cause__ = error
    # What is damaged may stand beside the pixels.
    if (bare := encoded.bare(data)) is not None:
        with contextlib.suppress(Exception):
            encoded.require_sound(data)
            return _decoded(bare, min_side, max_pixels)
    raise problem


def _decoded(data: bytes, min_side: int, max_pixels: int) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(
                f"{image.width} x {image.height} pixels, more than the {max_pixels:,} allowed"
            )
        found = _jpeg_pixels(data, image, min_side)
        if found is None:
            if min_side:
                image.draft(None, (min_side, min_side))
            image.load()
            found = np.asarray(_to_rgb(image))
        return upright(found, image)


def has_picture_name(name: str) -> bool:
    """Whether a file is called like a picture that ``decode`` reads."""
    return name.lower().endswith(SUFFIXES)


def has_picture_bytes(data: bytes) -> bool:
    """Whether a file begins like a picture that ``decode`` reads."""
    return _MAGIC.match(data) is not None


def colour_mode(data: bytes) -> str:
    """Pillow's name of the colour mode in which an encoded image is stored, such as "RGB"."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return image.mode


def _jpeg_pixels(data: bytes, image: Image.Image, min_side: int) -> np.ndarray | None:
    """The pixels that Pillow gives of a common JPEG, in less time; None of other images."""
    if image.format != "JPEG" or image.mode != "RGB":
        return None
    shrunk = min(image.size) // min_side if min_side else 1
    divisor = next(d for d in (8, 4, 2, 1) if shrunk >= d or d == 1)
    # simplejpeg knows further divisors, which take longer.
    height, width = (-(-side // divisor) if divisor > 1 else 0 for side in image.size[::-1])
    try:
        found = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    # Pillow decides which damage is tolerated, and names the rest.
    except ValueError:
        return None
    if profile := image.info.get("icc_profile"):
        return np.asarray(encoded.to_srgb(Image.fromarray(found), profile))
    return found


def upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """``pixels`` turned as the EXIF orientation of ``image`` says."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    # Most viewers ignore damaged EXIF beside sound pixels.
    except Exception:
        turn = None
    return pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))


def _to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if is_deep(image):
        return Image.fromarray(from_16_bits(image)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        colours = encoded.to_srgb(image.convert("RGB"), profile)
        ground = Image.new("RGB", image.size, "white")
        return Image.composite(colours, ground, image.getchannel("A"))
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    return encoded.to_srgb(image, profile)


def is_deep(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits a pixel and channel."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def from_16_bits(image: Image.Image | np.ndarray) -> np.ndarray:
    """Pixels of 16 bits as uint8.

    Raises:
      ValueError: they are floats, or outside 0..65535.
    """
    deep = np.asarray(image)
    if deep.dtype.kind == "f" or deep.min() < 0 or deep.max() > 65535:
        raise ValueError(f"pixels are {deep.dtype} outside 0..65535, so their white is unknown")
    return ((deep.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def load(path: str | os.PathLike) -> Image.Image:
    """The picture in a file, upright and in RGB; see ``decode``.

    Raises:
      UserError: the file cannot be read as a picture.
    """
    try:
        return Image.fromarray(decode(Path(path).read_bytes()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a picture: {error}") from error


def _require_rgb(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise UserError(f"a picture must be uint8 [H, W, 3], this is {image.dtype} {image.shape}")


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The crop for evaluation: the short side is resized to S, then the centred square is cut.

    The filter is bicubic and antialiased. As in the published transform, the resized long side is
    rounded down, and the larger half of an odd margin is at the end.

    Args:
      image: uint8 [H, W, 3].
      size: S.

    Returns:
      uint8 [S, S, 3]; ``image`` itself if it has that shape.

    Raises:
      UserError: ``image`` has another dtype or shape.
    """
    _require_rgb(image)
    height, width, _ = image.shape
    if width == height == size:
        return image
    short = min(width, height)
    new_width, new_height = size * width // short, size * height // short
    left, top = (new_width - size) // 2, (new_height - size) // 2
    x, y = width / new_width, height / new_height
    # The box leaves out what would be cut off the resized image.
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return _resize_box(image, box, size)


def random_crop(image: np.ndarray, size: int, uniforms: Sequence[float]) -> np.ndarray:
    """The published crop for training.

    1. A square of the short side s = min(H, W) is cut near the centre. On the long side of length h
       its offset is uniform on the whole numbers from floor(3 (h - s) / 8) to
       floor(5 (h - s) / 8) - 1, or the first of them if there is no other.
    2. It is resized (bicubic, antialiased) to a side that is uniform on
       S .. max(S, min(s, round(9 S / 8))).
    3. A square of side S is cut at an offset that is uniform on all that fit.

    Args:
      image: uint8 [H, W, 3].
      size: S.
      uniforms: ``NUM_UNIFORMS`` numbers in [0, 1), for the vertical and horizontal offset of the
        first square, the side, and the vertical and horizontal offset of the second square.

    Returns:
      uint8 [S, S, 3].

    Raises:
      UserError: ``image`` has another dtype or shape.
      ValueError: the uniforms are others.
    """
    if len(uniforms) != NUM_UNIFORMS or not all(0 <= u < 1 for u in uniforms):
        raise ValueError(f"uniforms are {uniforms}; {NUM_UNIFORMS} numbers in [0, 1) are needed")
    _require_rgb(image)
    top, left, side, scaled, inner_top, inner_left = crop_geometry(*image.shape[:2], size, uniforms)
    # The filter must not see what lies beside the square.
    square = image[top : top + side, left : left + side]
    if scaled == side:
        return square[inner_top : inner_top + size, inner_left : inner_left + size]
    ratio = side / scaled
    corners = (inner_left, inner_top, inner_left + size, inner_top + size)
    return _resize_box(square, tuple(c * ratio for c in corners), size)


def _resize_box(image: np.ndarray, box: tuple[float, ...], size: int) -> np.ndarray:
    pil = Image.fromarray(image)
    left, top, right, bottom = box
    # Rounding may put the far corner just outside, which Pillow refuses.
    box = (left, top, min(right, pil.width), min(bottom, pil.height))
    return np.asarray(pil.resize((size, size), Image.Resampling.BICUBIC, box))


def crop_geometry(
    height: int, width: int, size: int, uniforms: Sequence[float]
) -> tuple[int, int, int, int, int, int]:
    """What ``random_crop`` cuts, from the same arguments.

    Returns:
      ``top``, ``left`` and ``side`` s of the first square in pixels of the image, the side that it
      is resized to, and ``top`` and ``left`` of the second square in pixels of the resized one.
    """
    side = min(height, width)
    top, left = (
        _between(3 * (length - side) // 8, 5 * (length - side) // 8, u)
        for length, u in zip((height, width), uniforms[:2], strict=True)
    )
    largest = max(size, min(side, round(size * 9 / 8)))
    scaled = _between(size, largest + 1, uniforms[2])
    inner_top, inner_left = (_between(0, scaled - size + 1, u) for u in uniforms[3:])
    return top, left, side, scaled, inner_top, inner_left


def _between(low: int, high: int, uniform: float) -> int:
    """One of the whole numbers low .. high - 1, all equally likely; low if there is none."""
    count = max(1, high - low)
    # The product may round up to the count itself.
    return low + min(int(uniform * count), count - 1)


def flip(image: np.ndarray) -> np.ndarray:
    """The mirror image of [H, W, channels]: left and right are exchanged."""
    return np.ascontiguousarray(image[:, ::-1])


def may_flip(captions: Sequence[str]) -> bool:
    """Whether no caption says left or right, so that a mirror image is still described."""
    words = {word.strip(".,;:!?()'\"") for text in captions for word in text.lower().split()}
    return not any(part in _SIDES for word in words for part in word.split("-"))


def square(image: Picture, side: int) -> np.ndarray:
    """What the autoencoder sees of a user's picture: the crop for evaluation.

    Args:
      image: see ``pixels``.
      side: S.

    Returns:
      uint8 [S, S, 3].

    Raises:
      UserError: it is no picture, or cannot be read.
    """
    return center_crop(pixels(image), side)


def pixels(image: Picture) -> np.ndarray:
    """A user's picture as uint8 [H, W, 3], by the rules of ``decode``.

    Args:
      image: a Pillow image; or uint8 or uint16 [H, W] or [H, W, channels], where 1 channel is grey,
        2 are grey and opacity, 3 are RGB, and 4 are RGB and opacity.

    Raises:
      UserError: it is neither, or cannot be read.
    """
    require_no_path(image)
    if not isinstance(image, Image.Image):
        image = _from_array(np.asarray(image))
    try:
        return upright(np.asarray(_to_rgb(image)), image)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"the picture cannot be read: {error}") from error


def require_no_path(image: object) -> None:
    """Raises ``UserError`` if somebody gives a path for a picture."""
    if isinstance(image, str | os.PathLike):
        raise UserError(f"{image} is a path: open the picture first, PIL.Image.open(...)")


def _from_array(array: np.ndarray) -> Image.Image:
    is_grey = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 1)
    if array.dtype not in (np.uint8, np.uint16) or not (
        is_grey or (array.ndim == 3 and array.shape[-1] in (2, 3, 4))
    ):
        raise UserError(
            f"a picture must be uint8 [H, W, 3], this one is {array.dtype} {list(array.shape)}"
        )
    if array.dtype == np.uint16:
        array = from_16_bits(array)
    return Image.fromarray(array[..., 0] if is_grey and array.ndim == 3 else array)


def enlarge(image: np.ndarray) -> np.ndarray:
    """uint8 [S, S, 3] -> [k S, k S, 3], every pixel a k x k square; k = 1 for large pictures."""
    factor = max(1, round(_SHOWN_SIDE / image.shape[0]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def tiled(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures of one size in rows on white, with a margin around each of them."""
    width, height = (side + _MARGIN for side in rows[0][0].size)
    size = _MARGIN + max(map(len, rows)) * width, _MARGIN + len(rows) * height
    sheet = Image.new("RGB", size, "white")
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            sheet.paste(tile, (_MARGIN + j * width, _MARGIN + i * height))
    return sheet


def grid(images: np.ndarray, labels: Sequence[str]) -> Image.Image:
    """The pictures of each prompt in a row, with the prompt under them.

    Args:
      images: uint8 [P, J, S, S, 3].
      labels: P texts; an empty one is shown as "(no prompt)".
    """
    side = enlarge(images[0, 0]).shape[0]
    blank = np.full((_LABEL_HEIGHT, side, 3), 255, np.uint8)
    sheet = tiled(
        [[Image.fromarray(np.concatenate([enlarge(i), blank])) for i in row] for row in images]
    )
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(labels):
        top = _MARGIN + row * (side + _LABEL_HEIGHT + _MARGIN) + side + 3
        font = _font(label)
        text = _fit(label or "(no prompt)", font, sheet.width - 2 * _MARGIN)
        draw.text((_MARGIN, top), text, fill="black", font=font)
    return sheet


def _font(text: str) -> ImageFont.FreeTypeFont:
    """The first font that has every letter of a text: Pillow's own, or one of this machine."""
    own = font = ImageFont.load_default(_LABEL_SIZE)
    others = iter(_FONTS)
    while not _has_letters(font, text):
        name = next(others, None)
        if name is None:
            logging.warning("none of the fonts %s is here and has every letter of %r", _FONTS, text)
            return own
        with contextlib.suppress(OSError):
            font = ImageFont.truetype(name, _LABEL_SIZE)
    return font


def _has_letters(font: ImageFont.FreeTypeFont, text: str) -> bool:
    # A font draws one sign for all letters that it lacks, and no font has this one.
    lacking = bytes(font.getmask("\U0010ffff"))
    return all(bytes(font.getmask(letter)) != lacking for letter in set("".join(text.split())))


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text on one line, its end replaced by "…" if it is wider than ``width`` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def masked(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """``image`` uint8 [S, S, 3] with the cells of ``mask``, bool [h, w], in grey."""
    cell = image.shape[0] // mask.shape[0]
    hidden = mask.repeat(cell, axis=0).repeat(cell, axis=1)
    return np.where(hidden[..., None], np.uint8(160), image)


def save(path: str | os.PathLike, image: Image.Image, **options) -> None:
    """Writes a picture file that appears whole.

    Args:
      path: of the file; its suffix decides the format.
      image: the picture.
      **options: of ``PIL.Image.Image.save``.
    """
    with files.appearing(path) as scratch:
        image.save(scratch, **options)


def animation(frames: Sequence[Image.Image], milliseconds: int = 60) -> bytes:
    """A GIF that rests on its last frame; the others are shown for so many milliseconds."""
    durations = [milliseconds] * (len(frames) - 1) + [1500]
    file = io.BytesIO()
    rest = {"save_all": True, "append_images": frames[1:], "loop": 0}
    frames[0].save(file, "GIF", duration=durations, **rest)
    return file.getvalue()


def save_animation(path: str | os.PathLike, frames: Sequence[Image.Image]) -> None:
    """Writes the GIF of ``animation`` as a file that appears whole."""
    with files.appearing(path) as scratch:
        scratch.write_bytes(animation(frames))
