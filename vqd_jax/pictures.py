"""Grids and animations to look at, and pictures that a user brings.

Letters: P prompts, J images a prompt, S image side, F frames, N image tokens.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vqd_jax.data import images
from vqd_jax.errors import UserError

Picture = Image.Image | np.ndarray

MARGIN = 8
# Small pictures are enlarged to about this many pixels, by whole factors.
SHOWN_SIDE = 96


def enlarge(image: np.ndarray) -> np.ndarray:
    """uint8 [S, S, 3] -> [k S, k S, 3], every pixel a k x k square; k = 1 for large pictures."""
    factor = max(1, round(SHOWN_SIDE / image.shape[0]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def grid(images: np.ndarray, labels: Sequence[str]) -> Image.Image:
    """A row of pictures a prompt, with the prompt under it.

    Args:
      images: uint8 [P, J, S, S, 3].
      labels: P texts; an empty one is shown as "(no prompt)".
    """
    rows, columns = images.shape[:2]
    side = enlarge(images[0, 0]).shape[0]
    font = ImageFont.load_default(15)
    text_height = 26
    width = MARGIN + columns * (side + MARGIN)
    row_height = side + text_height + MARGIN
    canvas = Image.new("RGB", (width, MARGIN + rows * row_height), "white")
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(labels):
        top = MARGIN + row * row_height
        for column in range(columns):
            tile = Image.fromarray(enlarge(images[row, column]))
            canvas.paste(tile, (MARGIN + column * (side + MARGIN), top))
        text = _fit(label or "(no prompt)", font, width - 2 * MARGIN)
        draw.text((MARGIN, top + side + 3), text, fill="black", font=font)
    return canvas


def _fit(text: str, font, width: int) -> str:
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


def save_animation(path: str, frames: Sequence[Image.Image], milliseconds: int = 60) -> None:
    """Writes a GIF that rests on its last frame."""
    durations = [milliseconds] * (len(frames) - 1) + [1500]
    _atomically(
        path,
        lambda scratch: frames[0].save(
            scratch, save_all=True, append_images=frames[1:], duration=durations, loop=0
        ),
    )


def save(path: str, image: Image.Image) -> None:
    """Writes a picture; the file appears complete or not at all."""
    _atomically(path, image.save)


def _atomically(path: str, write) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".tmp-{target.name}")
    try:
        write(scratch)
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def square(image: Picture, side: int) -> np.ndarray:
    """uint8 [S, S, 3]: the largest centred square of a picture, resized.

    Raises:
      UserError: it is neither a Pillow image nor uint8 [H, W, 3].
    """
    pixels = _array(image, "RGB")
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise UserError(
            f"a picture must be uint8 [H, W, 3], this one is {pixels.dtype} {list(pixels.shape)}"
        )
    return pixels if pixels.shape[:2] == (side, side) else images.center_crop(pixels, side)


def _array(image: Picture, mode: str) -> np.ndarray:
    if isinstance(image, str | os.PathLike):
        raise UserError(f"{image} is a path: open the picture first, PIL.Image.open(...)")
    return np.asarray(image.convert(mode) if isinstance(image, Image.Image) else image)


def token_mask(mask: Picture, image: Picture, grid: tuple[int, int]) -> np.ndarray:
    """bool [N]: the tokens that have a masked pixel, after the crop of ``square``.

    Args:
      mask: [H, W] or [H, W, C] or a Pillow image; masked where it is true, above a half (floats up
        to 1) or above 127.
      image: the picture it belongs to.
      grid: rows and columns of the tokens.

    Raises:
      UserError: the two are of different sizes.
    """
    mask, size = _array(mask, "L"), _array(image, "RGB").shape[:2]
    if mask.ndim not in (2, 3) or mask.shape[:2] != tuple(size):
        raise UserError(
            f"the mask is {list(mask.shape)}, the picture {list(size)}: they must be of one size"
        )
    mask = mask if mask.ndim == 2 else mask.max(axis=-1)
    half = 0.5 if mask.dtype.kind == "f" and mask.max(initial=0) <= 1 else 127
    paint = mask if mask.dtype == bool else mask > half
    side = min(paint.shape)
    top, left = ((length - side) // 2 for length in paint.shape)
    paint = paint[top : top + side, left : left + side]
    # The cell of every pixel; a square smaller than the grid has no pixel in some cells.
    rows, columns = (np.arange(side) * cells // side for cells in grid)
    cells = np.zeros(grid, bool)
    np.logical_or.at(cells, (rows[:, None], columns[None]), paint)
    return cells.reshape(-1)
