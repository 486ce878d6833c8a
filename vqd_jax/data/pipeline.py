"""The Grain chain: records -> images or cached codes -> batches, deterministic and resumable.

Letters: B batch (of this process), N image tokens, L text tokens, S image side in pixels.

Order of a training stream: every epoch is shuffled anew, the epochs follow each other without a
gap, and process p of P takes the places p, p + P, p + 2P, ... So one step sees the same records on
any number of processes, and a stream's position is one number.
"""

import io
import threading
from collections.abc import Sequence

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from vqd_jax.data.text import END_ID, PAD_ID, START_ID
from vqd_jax.errors import UserError


def _to_text(value):
    """Bytes to str, at any depth of dicts and lists; numbers as they are."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: _to_text(v) for key, v in value.items()}
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype == object):
        return [_to_text(v) for v in value]
    return value


def _decode(stored: dict) -> dict:
    record = {key: _to_text(value) for key, value in stored.items() if key != "image"}
    try:
        with Image.open(io.BytesIO(stored["image"])) as image:
            record["image"] = np.asarray(image.convert("RGB"))
    # Pillow reports damage as OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        raise ValueError(f"{record.get('file', 'image')}: {error}") from error
    return record


def records(builder: tfds.core.DatasetBuilder, split: str) -> grain.MapDataset:
    """The records of a split, in the order in which they are stored, decoded when read.

    Args:
      builder: a prepared TFDS builder; see `vqd_jax.data.builders.load`.
      split: such as 'train' or 'train[:100]'.

    Returns:
      A random-access sequence of dicts: `image` uint8 [H, W, 3], texts as str, sequences of texts
      as lists of str. Reading a record whose image cannot be decoded raises ValueError.
    """
    # TFDS would return palette indices or four channels for some files, so decode here.
    decoders = {"image": tfds.decode.SkipDecoding()}
    return grain.MapDataset.source(builder.as_data_source(split, decoders=decoders)).map(_decode)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Cuts the largest centred square and resizes it, anti-aliased (bicubic).

    Args:
      image: uint8 [H, W, 3].
      size: S.

    Returns:
      uint8 [S, S, 3]; `image` itself if it has that shape.

    Raises:
      ValueError: not uint8 [H, W, 3].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"image is {image.dtype} {image.shape}; it must be uint8 [H, W, 3]")
    height, width, _ = image.shape
    if height == width == size:
        return image
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = (left, top, left + side, top + side)
    # Cut first: given a box to resize, Pillow's filter would also see what lies beside it.
    cut = Image.fromarray(image).crop(square)
    return np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC))


class CheckedReader:
    """Reads records by index; bad ones are counted, named in a log and given as None.

    A record is bad when reading it raises, or when it has an empty list of captions or an empty
    caption. Safe to call from several threads.

    Args:
      source: random-access records.
      max_bad_share: bad records tolerated, as a share of all records, 0 to 1.
    """

    def __init__(self, source: Sequence[dict], max_bad_share: float = 0.01):
        self.bad: dict[int, str] = {}
        self._source = source
        self._max_bad_share = max_bad_share
        self._lock = threading.Lock()

    def __call__(self, index: int) -> dict | None:
        """The record at `index`, or None if it is bad.

        Raises:
          UserError: more than the tolerated share of records is bad; the message has the counts.
        """
        try:
            record = self._source[index]
            captions = record.get("captions", ["none needed"])
            if len(captions) == 0 or not all(str(c).strip() for c in captions):
                raise ValueError(f"{record.get('file', 'record')}: empty caption")
        except Exception as error:
            self._report(index, f"{type(error).__name__}: {error}")
            return None
        return record

    def _report(self, index: int, reason: str) -> None:
        with self._lock:
            if index not in self.bad:
                self.bad[index] = reason
                logging.warning("record %d is skipped: %s", index, reason)
            bad, total = len(self.bad), len(self._source)
        if bad > self._max_bad_share * total:
            raise UserError(
                f"{bad} of {total} records are bad, more than the tolerated share of "
                f"{self._max_bad_share}; the last one is record {index} ({reason}). Repair or "
                "remove them, or raise config.data.max_bad_share"
            )


def _indices(count: int, batch_size: int, seed: int, train: bool) -> grain.MapDataset:
    """This process's stream of `epoch * count + record`: endless and shuffled, or once in order."""
    processes = jax.process_count()
    if count < batch_size * processes:
        raise UserError(
            f"{count} records are too few for one batch of {batch_size} on each of {processes} "
            "processes; lower the batch size"
        )
    stream = grain.MapDataset.range(count)
    if train:
        # The index, unlike the element, goes on counting in later epochs.
        stream = stream.map_with_index(lambda index, _: index).seed(seed).shuffle().repeat()
    else:
        # Equal numbers of batches on all processes, or the last step would hang.
        stream = stream[: count - count % (batch_size * processes)]
    return stream[jax.process_index() :: processes]


def image_dataset(
    source: Sequence[dict],
    image_size: int,
    batch_size: int,
    seed: int,
    train: bool,
    max_bad_share: float = 0.01,
    num_threads: int = 4,
) -> grain.IterDataset:
    """Batches of images, for the autoencoder.

    Args:
      source: random-access records with `image`; see `records`.
      image_size: S.
      batch_size: B, records in a batch of this process.
      seed: of the shuffling, 0 to 2**32 - 1.
      train: endless and shuffled; else once, in order, without the last incomplete batch.
      max_bad_share: see `CheckedReader`; bad records are left out of the stream, so that in
        evaluation a process that meets one may have a batch less than the others.
      num_threads: threads that read and decode.

    Returns:
      An iterable of `{'image': uint8 [B, S, S, 3]}`. Its iterators have `get_state` and
      `set_state`, and can be saved by `grain.checkpoint.CheckpointSave`.

    Raises:
      ValueError: fewer records than one batch; while iterating, too many bad records.
    """

    def resized(record):
        return {**record, "image": resize(record["image"], image_size)}

    # Resized inside the check, so that an array of the wrong kind is a bad record as well.
    read = CheckedReader(grain.MapDataset.source(source).map(resized), max_bad_share)

    def image(index):
        record = read(index % len(source))
        return None if record is None else {"image": record["image"]}

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * batch_size)
    stream = _indices(len(source), batch_size, seed, train).map(image)
    return stream.to_iter_dataset(options).batch(batch_size, drop_remainder=True)


def _uniforms(seed: int, keys: np.ndarray) -> np.ndarray:
    """Two numbers in [0, 1) for every key: float64 [2, B], by SplitMix64 of (seed, key).

    A counter-based generator for whole batches: numpy's own would be seeded record by record, which
    costs more than everything else in the chain.
    """
    gamma = np.uint64(0x9E3779B97F4A7C15)
    start = np.uint64(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    z = start + gamma * (2 * keys.astype(np.uint64) + np.arange(1, 3, dtype=np.uint64)[:, None])
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)) * 2.0**-53


def code_dataset(
    codes: np.ndarray,
    text_ids: Sequence[np.ndarray],
    batch_size: int,
    seed: int,
    null_text_rate: float,
    train: bool,
) -> grain.IterDataset:
    """Batches of cached codes with the ids of one caption each, for the denoiser.

    In training, which caption a record has, and whether it is emptied, is a function of (seed,
    record, epoch) alone. In evaluation it is the first caption, never emptied.

    Args:
      codes: integers [R, N], one row a record; kept in memory as they are.
      text_ids: R arrays, int32 [number of captions >= 1, L].
      batch_size: B, records in a batch of this process.
      seed: of shuffling and choices, 0 to 2**32 - 1.
      null_text_rate: probability of the empty caption in training, 0 to 1.
      train: endless and shuffled; else once, in order, without the last incomplete batch.

    Returns:
      An iterable of `{'codes': int32 [B, N], 'text_ids': int32 [B, L]}`; see `image_dataset` for
      its state.

    Raises:
      ValueError: lengths that differ, a record without captions, a rate outside 0..1, or fewer
        records than one batch.
    """
    if len(codes) != len(text_ids):
        raise ValueError(f"{len(codes)} rows of codes but captions of {len(text_ids)} records")
    if not 0 <= null_text_rate <= 1:
        raise ValueError(f"null_text_rate is {null_text_rate}; it must lie in 0..1")
    counts = np.array([len(ids) for ids in text_ids])
    if not counts.all():
        raise ValueError(f"record {int(counts.argmin())} has no caption; leave it out of the codes")
    all_ids = np.concatenate(text_ids).astype(np.int32)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    empty = np.full(all_ids.shape[1], PAD_ID, np.int32)
    empty[:2] = START_ID, END_ID

    def gather(indices):
        rows = indices % len(codes)
        ids = all_ids[first[rows]]
        if train:
            caption, null = _uniforms(seed, indices)
            ids = all_ids[first[rows] + (caption * counts[rows]).astype(np.int64)]
            ids[null < null_text_rate] = empty
        return {"codes": codes[rows].astype(np.int32), "text_ids": ids}

    stream = _indices(len(codes), batch_size, seed, train)
    # Batches of indices, then one gather a batch: the work for a record is a few index operations.
    batches = stream.batch(batch_size, drop_remainder=True, batch_fn=np.array).map(gather)
    # One thread is faster than several for data in memory, and leaves the others to the step.
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
