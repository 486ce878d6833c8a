"""Many pictures of a file of prompts: on all devices of all processes, resumable.

Pictures come in blocks of ``BLOCK``; a block is written when it is complete, and one that is there
is not made again. Of several processes each makes its own blocks. Picture k is of prompt k mod P.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging
from array_record.python import array_record_module
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from vqd_jax import pictures
from vqd_jax.errors import UserError
from vqd_jax.pipeline import VQDiffusion

BLOCK = 256
FORMATS = ("png", "array_record")


def read_prompts(path: str) -> list[str]:
    """The lines of a UTF-8 file; white space around them is dropped, and so are empty ones.

    Raises:
      UserError: it cannot be read, or has no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a file of prompts: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} has no prompt: give one a line")
    return prompts


def sample(
    model: VQDiffusion,
    prompts: Sequence[str],
    output: str,
    *,
    num_images: int,
    seed: int,
    mesh: Mesh,
    format: str = "png",
    batch_size: int = 64,
    **options,
) -> None:
    """Writes ``num_images`` pictures, or those that are still missing.

    Args:
      model: to sample from.
      prompts: P texts or class labels.
      output: folder: ``00000042.png``, or ``images-00000.array_record`` of ``BLOCK`` PNGs each; and
        ``prompts.txt``, line k of which is the prompt of picture k.
      num_images: of all prompts together.
      seed: decides the pictures.
      mesh: of this process's devices.
      format: a name in ``FORMATS``.
      batch_size: pictures in one call of the network.
      **options: of ``VQDiffusion.generate``.

    Raises:
      UserError: ``output`` holds pictures of other prompts.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        _claim(folder / "prompts.txt", [prompts[k % len(prompts)] for k in range(num_images)])
    model = model.on_mesh(mesh)
    blocks = range(0, num_images, BLOCK)[jax.process_index() :: jax.process_count()]
    with tqdm(total=num_images, desc="sampling", unit="image", mininterval=1) as bar:
        for start in blocks:
            numbers = np.arange(start, min(start + BLOCK, num_images))
            missing = [k for k in numbers if not _path(folder, k, format).exists()]
            if missing:
                made = _make(model, prompts, missing, seed, batch_size, options)
                _write(folder, missing, made, format)
            bar.update(len(numbers))
    logging.info("%d pictures of %d prompts are in %s", num_images, len(prompts), folder)


def _claim(path: Path, lines: list[str]) -> None:
    text = "\n".join(lines) + "\n"
    if path.exists():
        found = path.read_text(encoding="utf-8")
        if not (text.startswith(found) or found.startswith(text)):
            raise UserError(f"{path.parent} holds pictures of other prompts; use another --output")
        if found.startswith(text):
            return
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def _make(model, prompts, numbers, seed, batch_size, options) -> np.ndarray:
    pairs = [(k % len(prompts), k // len(prompts)) for k in numbers]
    codes = model.sample_codes(
        [prompts[i] for i, _ in pairs], pairs, seed=seed, batch_size=batch_size, **options
    )
    return model.decode_codes(codes, batch_size)


def _path(folder: Path, number: int, format: str) -> Path:
    if format == "png":
        return folder / f"{number:08d}.png"
    return folder / f"images-{number // BLOCK:05d}.array_record"


def _write(folder: Path, numbers: Sequence[int], pixels: np.ndarray, format: str) -> None:
    images = [Image.fromarray(p) for p in pixels]
    if format == "png":
        for number, image in zip(numbers, images, strict=True):
            pictures.save(str(_path(folder, number, format)), image)
        return
    path = _path(folder, numbers[0], format)
    scratch = path.with_suffix(".tmp")
    writer = array_record_module.ArrayRecordWriter(str(scratch), "group_size:1")
    for image in images:
        encoded = io.BytesIO()
        image.save(encoded, format="PNG")
        writer.write(encoded.getvalue())
    writer.close()
    os.replace(scratch, path)
