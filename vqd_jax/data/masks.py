"""Masks come in here, whoever gives them: a file, a Pillow image, an array.

The rule:

* Without transparency, what is lighter than a medium grey is painted. Bool: what is true.
* Strokes of one colour on a transparent ground: the strokes are painted. Black strokes are refused,
  because black means "keep" elsewhere.
* A picture with a transparent hole: the hole is painted.
* What may be read in two ways is refused, with what to do: colours in a mask without transparency,
  black and white beside transparency, a mask that is wholly transparent.

Letters: H, W height and width in pixels, N image tokens.
"""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from vqd_jax.data import images
from vqd_jax.data.images import Picture
from vqd_jax.errors import UserError

_REMEDY = "draw the part that is to be painted in white on black, without transparency"
# Colours of strokes may differ by as much, through the smoothing of their edges.
_ONE_COLOUR = 48
# Opaque pixels with at least as many colours are a picture.
_COLOURS_OF_A_PICTURE = 64
# Share of pixels that may be coloured: a JPEG has some between black and white.
_MOST_COLOURED = 0.01


def load(path: str | os.PathLike) -> np.ndarray:
    """The mask in a picture file: bool [H, W], true where to paint.

    Raises:
      UserError: the file cannot be read as a mask.
    """
    try:
        with Image.open(io.BytesIO(Path(path).read_bytes()), formats=images.FORMATS) as image:
            return read(image)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as a mask: {error}") from error


def read(mask: Picture) -> np.ndarray:
    """A mask as bool [H, W], true where to paint; see the rule above.

    Args:
      mask: a Pillow image; or [H, W] or [H, W, channels] of bool, whole numbers (0 and 1, to 255,
        or to 65535) or floats (to 1, or to 255), with 2 or 4 channels the last of which is opacity.

    Raises:
      UserError: it is none of these, or may be read in two ways.
    """
    array = _array(mask)
    if array.ndim not in (2, 3) or array.shape[-1] == 0 or not array.size:
        raise UserError(f"a mask must be [H, W] or [H, W, channels], not {list(array.shape)}")
    if array.dtype == bool:
        return array if array.ndim == 2 else array.any(axis=-1)
    levels = _levels(array)
    if levels.ndim == 2:
        return levels > 127
    colours, opacity = levels, None
    if levels.shape[-1] in (2, 4):
        colours, opacity = levels[..., :-1], levels[..., -1]
    if opacity is not None and opacity.min() < 250:
        return _of_opacity(colours, opacity)
    darkest, lightest = colours.min(axis=-1), colours.max(axis=-1)
    if ((darkest > 127) != (lightest > 127)).mean() > _MOST_COLOURED:
        raise UserError(f"the mask has colours, which may mean anything: {_REMEDY}")
    return (darkest + lightest) / 2 > 127


def _array(mask: Picture) -> np.ndarray:
    images.require_no_path(mask)
    if not isinstance(mask, Image.Image):
        return np.asarray(mask)
    try:
        if mask.has_transparency_data:
            pixels = np.asarray(mask.convert("RGBA"))
        elif mask.mode in ("1", "L") or images.is_deep(mask):
            # A float image raises the error of ``images``: its white is unknown.
            pixels = images.from_16_bits(mask) if images.is_deep(mask) else np.asarray(mask)
        else:
            pixels = np.asarray(mask.convert("RGB"))
        return images.upright(pixels, mask)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"the mask cannot be read: {error}") from error


def _levels(array: np.ndarray) -> np.ndarray:
    """Floats from 0 to 255 of numbers in any of the usual ranges."""
    if array.dtype.kind not in "uif":
        raise UserError(f"a mask must be of bool or numbers, not {array.dtype}")
    levels = array.astype(np.float64)
    largest = levels.max()
    if not (np.isfinite(levels).all() and levels.min() >= 0 and largest <= 65535):
        raise UserError("the numbers of a mask must lie in 0..1, 0..255 or 0..65535")
    if largest <= 1:
        return levels * 255
    return levels if largest <= 255 else levels * 255 / 65535


def _of_opacity(colours: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """What is painted, of colours [H, W, 1 or 3] and opacity [H, W], from 0 to 255."""
    if not opacity.any():
        raise UserError(f"the mask is transparent everywhere: {_REMEDY}")
    drawn = opacity > opacity.max() / 2
    found = colours[drawn]
    if (found.max(axis=0) - found.min(axis=0)).max() <= _ONE_COLOUR:
        if found.max() < 64:
            raise UserError(
                "the mask has black strokes on a transparent ground, and black means keep, strokes "
                f"mean paint: {_REMEDY}"
            )
        return drawn
    if len(np.unique(found.astype(np.uint8), axis=0)) >= _COLOURS_OF_A_PICTURE:
        return ~drawn
    raise UserError(f"the mask has several colours and transparency: {_REMEDY}")


def of_tokens(mask: Picture, image: Picture, grid: tuple[int, int]) -> np.ndarray:
    """The tokens that have a masked pixel, after the crop of ``images.square``.

    Args:
      mask: see ``read``.
      image: the picture that the mask belongs to.
      grid: rows and columns of the tokens.

    Returns:
      bool [N].

    Raises:
      UserError: the two are of different sizes, or the mask may be read in two ways.
    """
    paint = _of_size(mask, images.pixels(image).shape)
    paint, side = paint[_centre(paint.shape)], min(paint.shape)
    # The cell of every pixel; a square smaller than the grid has no pixel in some cells.
    rows, columns = (np.arange(side) * cells // side for cells in grid)
    cells = np.zeros(grid, bool)
    np.logical_or.at(cells, (rows[:, None], columns[None]), paint)
    return cells.reshape(-1)


def paste(made: np.ndarray, image: Picture, mask: Picture) -> Image.Image:
    """A picture with its masked pixels made anew, at its own size; no other pixel changes.

    Args:
      made: uint8 [S, S, 3], made of the square that ``images.square`` cuts from the picture. It is
        resized to that square. What is masked beside the square stays as it is.
      image: the picture [H, W].
      mask: as for ``of_tokens``.

    Returns:
      A Pillow image of the picture's own size.
    """
    pixels = np.array(images.pixels(image))
    paint = _of_size(mask, pixels.shape)
    side, centre = min(paint.shape), _centre(paint.shape)
    whole = Image.fromarray(made).resize((side, side), Image.Resampling.BICUBIC)
    pixels[centre][paint[centre]] = np.asarray(whole)[paint[centre]]
    return Image.fromarray(pixels)


def _of_size(mask: Picture, size: tuple[int, ...]) -> np.ndarray:
    """A mask as ``read`` gives it, of a picture [H, W, 3] of this size."""
    paint = read(mask)
    if paint.shape != tuple(size[:2]):
        raise UserError(
            f"the mask is {list(paint.shape)}, the picture {list(size[:2])}: they must be of one "
            "size"
        )
    return paint


def _centre(size: tuple[int, int]) -> tuple[slice, slice]:
    """Where the square is that is cut from a picture [H, W]."""
    side = min(size)
    first = [(length - side) // 2 for length in size]
    return tuple(slice(start, start + side) for start in first)
