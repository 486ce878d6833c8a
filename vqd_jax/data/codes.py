"""Images -> cached codes: what stage two trains on.

Letters: R records, B batch, S image side, N image tokens, L text tokens.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from vqd_jax.data import pipeline


class CachedSplit(NamedTuple):
    """Codes and captions of a split, good records only, in the order in which they are stored.

    Attributes:
      codes: uint16 [R, N].
      captions: R lists of str.
    """

    codes: np.ndarray
    captions: list[list[str]]


def fingerprint(params: dict[str, np.ndarray]) -> str:
    """Hexadecimal SHA-256 of named arrays: tells one autoencoder from another."""
    digest = hashlib.sha256()
    for name in sorted(params):
        array = np.ascontiguousarray(params[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def cached_split(
    path: str,
    origin: dict[str, object],
    source: Sequence[dict],
    encode: Callable[[np.ndarray], np.ndarray],
    *,
    image_size: int,
    batch_size: int,
    max_bad_share: float,
) -> CachedSplit:
    """Reads the cache at ``path``, or encodes the records and writes it.

    Args:
      path: an .npz file; it appears complete or not at all.
      origin: what the codes depend on (data set, split, autoencoder). A cache with another origin
        is made anew.
      source: random-access records with ``image`` and ``captions``.
      encode: uint8 [B, S, S, 3] -> integers [B, N].
      image_size, batch_size: S and B.
      max_bad_share: share of unreadable records that stops the run.
    """
    wanted = json.dumps(origin, sort_keys=True)
    found = _read(Path(path), wanted)
    if found is not None:
        return found
    codes, captions = _encode(source, encode, image_size, batch_size, max_bad_share, Path(path))
    _write(Path(path), wanted, codes, captions)
    return CachedSplit(codes, captions)


def _read(path: Path, wanted: str) -> CachedSplit | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as cache:
            if str(cache["origin"]) != wanted:
                return None
            split = CachedSplit(cache["codes"], json.loads(str(cache["captions"])))
        if len(split.codes) != len(split.captions):
            raise ValueError(f"{len(split.codes)} codes, {len(split.captions)} captions")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logging.warning("%s is damaged and made anew: %s", path, error)
        return None
    return split


def _encode(source, encode, image_size, batch_size, max_bad_share, path):
    read = pipeline.CheckedReader(source, max_bad_share)
    codes, captions, images = [], [], []
    bar = tqdm(total=len(source), desc=f"encoding {path.stem}", unit="image", mininterval=1)

    def flush():
        # One shape for every call, so that there is one compilation.
        batch = np.stack(images + [images[-1]] * (batch_size - len(images)))
        codes.append(np.asarray(encode(batch))[: len(images)].astype(np.uint16))
        images.clear()

    with bar:
        for index in range(len(source)):
            record = read(index)
            if record is not None:
                images.append(pipeline.resize(record["image"], image_size))
                captions.append(list(record["captions"]))
            if images and (len(images) == batch_size or index == len(source) - 1):
                flush()
            bar.update()
    return np.concatenate(codes), captions


def _write(path: Path, origin: str, codes: np.ndarray, captions: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    try:
        with open(scratch, "wb") as file:
            np.savez(file, origin=origin, codes=codes, captions=json.dumps(captions))
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
