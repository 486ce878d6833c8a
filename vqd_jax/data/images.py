"""Encoded images to pixels, and the published crops: pure functions of what they are given.

Letters: H, W height and width of an image in pixels, S side of a crop.
"""

import io
import warnings
from collections.abc import Sequence

import numpy as np
import simplejpeg
from PIL import Image

# What data sets ship. Pillow knows more, among them EPS, which runs an interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
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
_SIDES = {"left", "right", "lefthand", "righthand", "leftmost", "rightmost", "leftward"} | {
    *("rightward", "leftwards", "rightwards", "clockwise", "counterclockwise", "anticlockwise")
}
# Numbers in [0, 1) that `random_crop` takes.
NUM_UNIFORMS = 5

# We refuse by MAX_PIXELS; Pillow's warning would come first and once only.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(data: bytes, min_side: int = 0) -> np.ndarray:
    """The upright RGB pixels of an encoded image of any colour mode.

    The EXIF orientation is applied; 16-bit pixels are scaled to 8 bits; transparency is composited
    on white; of several frames the first is taken.

    Args:
      data: the bytes of a JPEG, PNG, WebP, GIF, BMP, TIFF, PPM or AVIF file.
      min_side: if positive, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size (which is faster)
        as long as neither side falls below this.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ValueError: with the reason: empty, not an image, truncated or damaged, more than
        ``MAX_PIXELS`` pixels, or pixels without a defined range.
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} pixels, more than the {MAX_PIXELS:,} allowed"
                )
            turn = _TURNS.get(_orientation(image))
            pixels = _jpeg_pixels(data, image, min_side)
            if pixels is None:
                if min_side:
                    image.draft(None, (min_side, min_side))
                image.load()
                pixels = np.asarray(_to_rgb(image))
    except Image.UnidentifiedImageError:
        raise ValueError("not an image of a known format") from None
    # Pillow reports damage as OSError, SyntaxError, struct.error, EOFError, ...
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if turn is None:
        return pixels
    return np.asarray(Image.fromarray(pixels).transpose(turn))


def _jpeg_pixels(data: bytes, image: Image.Image, min_side: int) -> np.ndarray | None:
    """The pixels of a common JPEG, as Pillow gives them, but sooner; None of other images."""
    if image.format != "JPEG" or image.mode != "RGB":
        return None
    shrunk = min(image.size) // min_side if min_side else 1
    divisor = next(d for d in (8, 4, 2, 1) if shrunk >= d or d == 1)
    # Other divisors would do as well, but take longer.
    height, width = (-(-side // divisor) if divisor > 1 else 0 for side in image.size[::-1])
    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    # Pillow decides which damage can be borne, and names the rest.
    except ValueError:
        return None


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    # Damaged EXIF beside sound pixels: most viewers ignore it.
    except Exception:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_from_16_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"pixels are {pixels.dtype} outside 0..65535, so their white is unknown")
    return ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _require_rgb(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"image is {image.dtype} {image.shape}; it must be uint8 [H, W, 3]")


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The crop for evaluation: short side to S (bicubic, antialiased), then the centred square.

    The resized long side is cut to a whole number, as in the published transform; of an odd margin
    the larger half is at the end.

    Args:
      image: uint8 [H, W, 3].
      size: S.

    Returns:
      uint8 [S, S, 3]; ``image`` itself if it has that shape.

    Raises:
      ValueError: another kind of image.
    """
    _require_rgb(image)
    height, width, _ = image.shape
    if width == height == size:
        return image
    short = min(width, height)
    new_width, new_height = size * width // short, size * height // short
    left, top = (new_width - size) // 2, (new_height - size) // 2
    x, y = width / new_width, height / new_height
    # The box cuts what is not kept out of the resized image before it is computed.
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return _resize_box(image, box, size)


def random_crop(image: np.ndarray, size: int, uniforms: Sequence[float]) -> np.ndarray:
    """The published crop for training.

    A square of the short side s = min(H, W), near the centre: on the long side of length h its
    offset is uniform on the whole numbers from floor(3 (h - s) / 8) to floor(5 (h - s) / 8) - 1, or
    the first of them if there is no other. The square is resized (bicubic, antialiased) to a side
    uniform on S .. max(S, min(s, round(9 S / 8))), and a square of side S is cut at an offset
    uniform on all that fit.

    Args:
      image: uint8 [H, W, 3].
      size: S.
      uniforms: ``NUM_UNIFORMS`` numbers in [0, 1): vertical and horizontal offset of the first
        square, side, vertical and horizontal offset of the second square.

    Returns:
      uint8 [S, S, 3].

    Raises:
      ValueError: another kind of image, or other uniforms.
    """
    if len(uniforms) != NUM_UNIFORMS or not all(0 <= u < 1 for u in uniforms):
        raise ValueError(f"uniforms are {uniforms}; {NUM_UNIFORMS} numbers in [0, 1) are needed")
    _require_rgb(image)
    top, left, side, scaled, inner_top, inner_left = crop_geometry(*image.shape[:2], size, uniforms)
    # Cut first: the filter must not see what lies beside the square.
    square = image[top : top + side, left : left + side]
    if scaled == side:
        return square[inner_top : inner_top + size, inner_left : inner_left + size]
    ratio = side / scaled
    corners = (inner_left, inner_top, inner_left + size, inner_top + size)
    return _resize_box(square, tuple(c * ratio for c in corners), size)


def _resize_box(image: np.ndarray, box: tuple[float, ...], size: int) -> np.ndarray:
    pil = Image.fromarray(image)
    left, top, right, bottom = box
    # Rounding may put the far corner outside by a hair, which Pillow refuses.
    box = (left, top, min(right, pil.width), min(bottom, pil.height))
    return np.asarray(pil.resize((size, size), Image.Resampling.BICUBIC, box))


def crop_geometry(
    height: int, width: int, size: int, uniforms: Sequence[float]
) -> tuple[int, int, int, int, int, int]:
    """What ``random_crop`` cuts.

    Returns:
      (top, left, side s) of the first square in pixels of the image; (side, top, left) of the
      resized square and of the second one in it.
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
    """A whole number in low .. high - 1 (low if that is empty), each for an equal share."""
    count = max(1, high - low)
    # The product of a number just below 1 may round up to the count itself.
    return low + min(int(uniform * count), count - 1)


def flip(image: np.ndarray) -> np.ndarray:
    """The mirror image: left and right exchanged.

    Args:
      image: [H, W, channels].
    """
    return np.ascontiguousarray(image[:, ::-1])


def may_flip(captions: Sequence[str]) -> bool:
    """Whether no caption says left or right, so that a mirror image is still described."""
    words = {word.strip(".,;:!?()'\"") for text in captions for word in text.lower().split()}
    return not any(part in _SIDES for word in words for part in word.split("-"))
