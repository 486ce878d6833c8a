"""Thousands of pictures in a folder: drawn in blocks that processes share, and never made twice.

Letters: P prompts.
"""

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from array_record.python import array_record_module
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from vqd_jax import files
from vqd_jax.data import images
from vqd_jax.errors import UserError
from vqd_jax.parallel import processes
from vqd_jax.pipeline import VQDiffusion

# Pictures that are drawn before they are written; those in one file of records.
BLOCK = 256
FORMATS = ("png", "array_record")


def sample_many(
    model: VQDiffusion,
    prompts: Sequence[str],
    output: str,
    *,
    num_images: int,
    seed: int,
    mesh: Mesh,
    format: str = "png",
    batch_size: int = 64,
    negative_prompt: str | None = None,
    **options: Any,
) -> None:
    """Writes ``num_images`` pictures, or those that are still missing.

    Picture k is of prompt k mod P. Pictures come in blocks of ``BLOCK``, which several processes
    share. A block is written when it is complete, and one that is there is not made again.

    Args:
      model: to sample from.
      prompts: P texts or class labels.
      output: folder: ``00000042.png``, or ``images-00000.array_record`` of ``BLOCK`` PNGs each;
        ``prompts.txt``, line k of which is the prompt of picture k; and ``manifest.json``, which
        says what made the pictures.
      num_images: of all prompts together.
      seed: decides the pictures.
      mesh: of this process's devices.
      format: a name in ``FORMATS``.
      batch_size: pictures in one call of the network.
      negative_prompt: of ``VQDiffusion.generate``.
      **options: of ``VQDiffusion.settings``.

    Raises:
      UserError: ``output`` holds pictures of another model or request.
    """
    request = {"seed": seed, "negative_prompt": negative_prompt}
    _claim(Path(output), model, prompts, num_images, format, request, options)
    model = model.on_mesh(mesh)
    blocks = [range(k, min(k + BLOCK, num_images)) for k in range(0, num_images, BLOCK)]
    waiting = [block for block in blocks if _missing(output, block, format)]
    # Every process must have seen the same ones before any is written.
    processes.wait_for_all(f"{output}: blocks listed")
    mine = waiting[jax.process_index() :: jax.process_count()]
    with tqdm(total=sum(map(len, mine)), desc="sampling", unit="image", mininterval=1) as bar:
        for block in mine:
            missing = _missing(output, block, format)
            drawn = _whole_batches(block, missing, batch_size)
            pairs = [(k % len(prompts), k // len(prompts)) for k in drawn]
            texts = [prompts[i] for i, _ in pairs]
            made = model.sample_rows(texts, pairs, batch_size=batch_size, **request, **options)
            pixels = model.decode_codes(made.codes, batch_size)
            places = [drawn.index(k) for k in missing]
            _write(output, missing, pixels[places], format)
            bar.update(len(block))
    processes.wait_for_all(f"{output}: pictures written")
    logging.info("%d pictures of %d prompts are in %s", num_images, len(prompts), output)


def _claim(folder: Path, model, prompts, num_images, format, request, options) -> None:
    """Makes the folder and its manifest, or finds that they belong to the same request."""
    settings = model.settings(**options)
    wanted = {
        "model": model.fingerprint()[:16],
        "prompts": files.fingerprint({"prompts": list(prompts)})[:16],
        "format": format,
        **request,
    }
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        value = repr(value) if field.name == "rule" else value
        wanted[field.name] = np.asarray(value).tolist() if np.ndim(value) else value
    wanted = json.loads(json.dumps(wanted, default=float))
    path, remedy = folder / "manifest.json", "use another --output"

    def changes(stored):
        return files.differences({**stored, "num_images": 0}, {**wanted, "num_images": 0})

    folder.mkdir(parents=True, exist_ok=True)
    if processes.is_writer():
        if not path.exists() and (folder / "prompts.txt").exists():
            raise UserError(f"{folder} holds pictures but no {path.name}; {remedy}")
        stored = files.read_json(path, remedy) if path.exists() else wanted
        if not changes(stored):
            count = max(num_images, stored.get("num_images", 0))
            files.write_json(path, {**wanted, "num_images": count})
            lines = [f"{prompts[k % len(prompts)]}\n" for k in range(count)]
            files.write_text(folder / "prompts.txt", "".join(lines))
    processes.wait_for_all(f"{folder}: manifest written")
    changed = "; ".join(changes(files.read_json(path, remedy)))
    if changed:
        raise UserError(f"{folder} holds pictures of another request ({changed}); {remedy}")


def _path(folder: str, number: int, format: str) -> Path:
    if format == "png":
        return Path(folder) / f"{number:08d}.png"
    return Path(folder) / f"images-{number // BLOCK:05d}.array_record"


def _missing(folder: str, block: range, format: str) -> list[int]:
    """The pictures of a block that are not there; all of them, if its file has too few."""
    if format == "png":
        return [k for k in block if not _path(folder, k, format).exists()]
    path, found = _path(folder, block[0], format), 0
    if path.exists():
        reader = array_record_module.ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()
    return [] if found >= len(block) else list(block)


def _whole_batches(block: range, missing: list[int], batch_size: int) -> list[int]:
    """The pictures of the batches of a block that have a missing one.

    A processor may round a picture otherwise in a batch of another size, so a batch is drawn again
    as it was.
    """
    batches = {(k - block[0]) // batch_size for k in missing}
    return [k for k in block if (k - block[0]) // batch_size in batches]


def _write(folder: str, numbers: Sequence[int], pixels: np.ndarray, format: str) -> None:
    path = _path(folder, numbers[0], format)
    if format == "png":
        for number, image in zip(numbers, pixels, strict=True):
            images.save(_path(folder, number, format), Image.fromarray(image))
        return
    with files.appearing(path) as scratch:
        writer = array_record_module.ArrayRecordWriter(str(scratch), "group_size:1")
        for image in pixels:
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, format="PNG")
            writer.write(encoded.getvalue())
        writer.close()
