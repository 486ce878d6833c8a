"""The chain of the data: records -> crops or cached codes -> batches that training consumes.

Letters: B batch (of this process), N image tokens, L text tokens, S image side in pixels, D width
of text features.

Batches are deterministic and resumable: ``order`` decides the order of the records and what a
checkpoint keeps of it.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds

from vqd_jax.data import images, order
from vqd_jax.data.bad_records import CheckedReader
from vqd_jax.data.codes import CodesSource
from vqd_jax.errors import UserError

# Streams of random numbers beside the one that chooses captions.
CROP_STREAM = 1
VIEW_STREAM = 2


def _to_text(value):
    """Bytes become str at any depth of dicts and lists; numbers stay as they are."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: _to_text(v) for key, v in value.items()}
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype == object):
        return [_to_text(v) for v in value]
    return value


def _decode(stored: dict) -> dict:
    try:
        return {**stored, "image": images.decode(stored["image"])}
    except ValueError as error:
        raise ValueError(f"{stored.get('file', 'image')}: {error}") from error


def _texts(stored: dict) -> dict:
    return {key: x if key == "image" else _to_text(x) for key, x in stored.items()}


def records(builder: tfds.core.DatasetBuilder, split: str, decode: bool = True) -> grain.MapDataset:
    """The records of a split, in the order in which they are stored.

    Args:
      builder: a prepared TFDS builder; see ``vqd_jax.data.sets.load``.
      split: such as 'train' or 'train[:100]'.
      decode: give pixels; otherwise the encoded bytes, which ``Crop`` decodes faster.

    Returns:
      A random-access sequence of dicts: ``image`` is uint8 [H, W, 3] or bytes, texts are str, and
      sequences of texts are lists of str. Reading a record raises ValueError if its image cannot be
      decoded.
    """
    # TFDS would return palette indices or four channels for some files.
    decoders = {"image": tfds.decode.SkipDecoding()}
    source = grain.MapDataset.source(builder.as_data_source(split, decoders=decoders)).map(_texts)
    return source.map(_decode) if decode else source


@dataclasses.dataclass(frozen=True)
class Crop:
    """From a record's image to the square that the autoencoder sees.

    Attributes:
      size: S.
      random: the published crop for training; otherwise the one for evaluation.
      flip: mirror half of the crops, unless a caption says left or right.
    """

    size: int
    random: bool = False
    flip: bool = False

    def __call__(self, record: dict, seed: int, key: int) -> np.ndarray:
        """A crop that is a function of (image, seed, key).

        Args:
          record: ``image``, bytes or uint8 [H, W, 3]; maybe ``captions``.
          seed: of the run.
          key: another number is another random crop.

        Returns:
          uint8 [S, S, 3].

        Raises:
          ValueError: the image cannot be decoded.
        """
        image = record["image"]
        numbers = None
        if self.random or self.flip:
            numbers = order.uniforms((seed, CROP_STREAM), np.array([key]), images.NUM_UNIFORMS + 1)
            numbers = numbers[:, 0].tolist()
        if isinstance(image, bytes):
            # At twice the side that is kept, large photographs decode faster, and the filter that
            # shrinks them still averages several pixels.
            image = images.decode(image, min_side=2 * round(self.size * 9 / 8))
        if self.random:
            pixels = images.random_crop(image, self.size, numbers[:-1])
        else:
            pixels = images.center_crop(image, self.size)
        if self.flip and numbers[-1] < 0.5 and images.may_flip(record.get("captions", ())):
            pixels = images.flip(pixels)
        return pixels


def image_dataset(
    source: Sequence[dict],
    crop: Crop,
    batch_size: int,
    seed: int,
    max_bad_share: float = 0.01,
    *,
    record_weights: np.ndarray | None = None,
    num_threads: int | None = None,
    bad_log: str | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> order.Batches:
    """Endless shuffled batches of images, for training the autoencoder.

    The next good record takes the place of a bad one, so that all processes stay in step.

    Args:
      source: random-access records with ``image``; see ``records``, faster with ``decode=False``.
      crop: from an image to S x S.
      batch_size: B, records in a batch of this process.
      seed: of the shuffling and the crops, 0 to 2**32 - 1.
      max_bad_share, bad_log: see ``bad_records.CheckedReader``.
      record_weights: how often each record comes; see ``order.shuffled``.
      num_threads: threads that read and decode; None is one for each core, up to 8.
      process_index, process_count: None asks JAX.

    Returns:
      An iterable of ``{'image': uint8 [B, S, S, 3]}``; ``order`` describes its state.

    Raises:
      UserError: fewer records than one batch; while iterating, too many bad records.
      OSError: while iterating, the system cannot read a record.
    """
    num_threads = num_threads or min(os.cpu_count() or 1, 8)
    read = CheckedReader(source, max_bad_share, bad_log, needs_captions=False)

    def images_of(keys):
        batch = np.empty((len(keys), crop.size, crop.size, 3), np.uint8)
        for row, key in zip(batch, keys.tolist(), strict=True):
            row[...] = _good_image(read, crop, seed, key)
        return {"image": batch}

    def make(local):
        # Each thread makes a whole batch, because Grain's own work on an element is Python's.
        options = grain.ReadOptions(num_threads, prefetch_buffer_size=num_threads)
        keys = local.batch(batch_size, drop_remainder=True, batch_fn=np.array)
        return keys.map(images_of).to_iter_dataset(options)

    places = order.shuffled([len(source)], seed, record_weights=record_weights)
    return order.Batches(places, make, len(source), batch_size, process_index, process_count)


def _good_image(read: CheckedReader, crop: Crop, seed: int, key: int) -> np.ndarray:
    """The crop of record ``key``, counted through all epochs, or of the next good one."""
    for number in range(key, key + len(read)):
        made = read(number % len(read), lambda record: {"image": crop(record, seed, key)})
        if made is not None:
            return made["image"]
    raise UserError(f"none of the {len(read)} records can be used")


def code_dataset(
    sources: CodesSource | Sequence[CodesSource],
    batch_size: int,
    seed: int,
    null_text_rate: float,
    *,
    weights: Sequence[float] | None = None,
    record_weights: np.ndarray | None = None,
    with_ids: bool = False,
    process_index: int | None = None,
    process_count: int | None = None,
) -> order.Batches:
    """Endless shuffled batches of cached codes and their conditions, for training the denoiser.

    Args:
      sources: caches of one autoencoder; several are mixed.
      batch_size: B, records in a batch of this process.
      seed: of the shuffling and of ``choose``, 0 to 2**32 - 1.
      null_text_rate: probability that a caption or label is emptied, 0 to 1.
      weights: shares of several sets; None is by their numbers of records.
      record_weights: how often each record of the first set comes, by its number in the data set;
        see ``order.shuffled``.
      with_ids: add ``id`` (the number of the record in its data set), ``set``, ``crop`` and
        ``caption``, int64 [B].
      process_index, process_count: None asks JAX.

    Returns:
      An iterable of dicts; ``order`` describes its state. All have ``codes`` int32 [B, N]; with
      captions ``text_ids`` int32 [B, L] and, where they are cached, ``text_features`` float16
      [B, L, D]; with labels ``label`` int32 [B], in which the number of classes is the empty label.

    Raises:
      UserError: caches that do not fit together, impossible weights, or fewer records than one
        batch.
      ValueError: the rate lies outside 0..1.
    """
    sources = [sources] if isinstance(sources, CodesSource) else list(sources)
    if not 0 <= null_text_rate <= 1:
        raise ValueError(f"null_text_rate is {null_text_rate}; it must lie in 0..1")
    for other in sources[1:]:
        sources[0].require_same_layout(other)

    def gather(elements):
        return _gather(sources, choose(elements, sources, seed, null_text_rate), with_ids)

    def make(local):
        # Batches of elements, then one gather for each: reading many records at once is fast.
        batches = local.batch(batch_size, drop_remainder=True, batch_fn=np.array).map(gather)
        # This is Python's work, of which two threads would do less than one.
        return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))

    counts = [len(source) for source in sources]
    if record_weights is not None:
        record_weights = record_weights[[record.id for record in sources[0]]]
    places = order.shuffled(counts, seed, weights, record_weights)
    return order.Batches(places, make, sum(counts), batch_size, process_index, process_count)


class Choice(NamedTuple):
    """What a batch takes: arrays [B].

    Attributes:
      sets, rows: which record.
      crop, caption: numbers in [0, 1) that choose among what the record has.
      null: whether the caption or label is emptied.
    """

    sets: np.ndarray
    rows: np.ndarray
    crop: np.ndarray
    caption: np.ndarray
    null: np.ndarray


def choose(elements: np.ndarray, sources: Sequence, seed: int, null_text_rate: float) -> Choice:
    """What is taken of the records of a batch, as a function of (seed, set, record, epoch) alone.

    Args:
      elements: integers [B] of ``order.shuffled``.
      sources: the sets; only their lengths matter.
      seed: of the run.
      null_text_rate: probability that a caption or label is emptied.
    """
    sets, keys = order.split_keys(elements, len(sources))
    rows, numbers = np.empty_like(keys), np.empty((3, len(keys)))
    for s, source in enumerate(sources):
        mine = sets == s
        rows[mine] = keys[mine] % len(source)
        numbers[:2, mine] = order.uniforms((seed, s) if s else seed, keys[mine])
        numbers[2, mine] = order.uniforms((seed, s, VIEW_STREAM), keys[mine], 1)
    return Choice(sets, rows, numbers[2], numbers[0], numbers[1] < null_text_rate)


def _gather(sources: list[CodesSource], choice: Choice, with_ids: bool) -> dict[str, np.ndarray]:
    layout, size = sources[0], len(choice.rows)
    batch = {"codes": np.empty((size, layout.num_tokens), np.int32)}
    batch |= {key: np.empty((size, *x.shape), x.dtype) for key, x in layout.null.items()}
    if with_ids:
        batch |= {key: np.empty(size, np.int64) for key in ("id", "crop", "caption")}
        batch["set"] = choice.sets
    for s, source in enumerate(sources):
        (mine,) = np.nonzero(choice.sets == s)
        if len(mine):
            found = source.take(choice.rows[mine], choice.crop[mine], choice.caption[mine])
            for key in batch.keys() & found.keys():
                batch[key][mine] = found[key]
    for key, value in layout.null.items():
        batch[key][choice.null] = value
    return batch
