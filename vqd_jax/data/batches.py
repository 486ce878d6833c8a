"""The Grain chain: records -> crops or cached codes -> batches, deterministic and resumable.

Letters: B batch (of this process), N image tokens, L text tokens, S image side in pixels, D width
of text features.

The order of the records, and what a checkpoint keeps of it, is in ``order``.
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

# Streams of random numbers beside the one that chooses captions.
CROP_STREAM = 1
VIEW_STREAM = 2


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
    try:
        return {**stored, "image": images.decode(stored["image"])}
    except ValueError as error:
        raise ValueError(f"{stored.get('file', 'image')}: {error}") from error


def _texts(stored: dict) -> dict:
    record = {key: _to_text(value) for key, value in stored.items() if key != "image"}
    return {**record, "image": stored["image"]}


def records(builder: tfds.core.DatasetBuilder, split: str, decode: bool = True) -> grain.MapDataset:
    """The records of a split, in the order in which they are stored.

    Args:
      builder: a prepared TFDS builder; see ``vqd_jax.data.sets.load``.
      split: such as 'train' or 'train[:100]'.
      decode: give pixels; else the encoded bytes, which ``Crop`` decodes faster.

    Returns:
      A random-access sequence of dicts: ``image`` uint8 [H, W, 3] or bytes, texts as str, sequences
      of texts as lists of str. Reading a record whose image cannot be decoded raises ValueError.
    """
    # TFDS would return palette indices or four channels for some files, so decode here.
    decoders = {"image": tfds.decode.SkipDecoding()}
    source = grain.MapDataset.source(builder.as_data_source(split, decoders=decoders)).map(_texts)
    return source.map(_decode) if decode else source


@dataclasses.dataclass(frozen=True)
class Crop:
    """From a record's image to the square that the autoencoder sees.

    Attributes:
      size: S.
      random: the published crop for training; else the one for evaluation.
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
            # Twice the side that is kept: large photographs decode faster, and the filter that
            # shrinks them still has something to average.
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
    image_size: int,
    batch_size: int,
    seed: int,
    train: bool,
    max_bad_share: float = 0.01,
    *,
    crop: Crop | None = None,
    num_threads: int | None = None,
    bad_log: str | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> order.Batches:
    """Batches of images, for the autoencoder.

    Args:
      source: random-access records with ``image``; see ``records``, faster with ``decode=False``.
      image_size: S.
      batch_size: B, records in a batch of this process.
      seed: of the shuffling and the crops, 0 to 2**32 - 1.
      train: endless and shuffled; else once, in order, without the last incomplete batch.
      max_bad_share, bad_log: see ``CheckedReader``. In training the place of a bad record is taken
        by the good one after it, so that all processes stay in step; in evaluation it is left out.
      crop: None is the crop for evaluation.
      num_threads: threads that read and decode; None is one for each core, up to 8.
      process_index, process_count: None asks JAX.

    Returns:
      An iterable of ``{'image': uint8 [B, S, S, 3]}``, the state of which is in ``order``.

    Raises:
      UserError: fewer records than one batch; while iterating, too many bad records.
    """
    crop = crop or Crop(image_size)
    num_threads = num_threads or min(os.cpu_count() or 1, 8)
    read = CheckedReader(source, max_bad_share, bad_log, needs_captions=False)
    places = order.shuffled([len(source)], seed) if train else grain.MapDataset.range(len(source))

    def image(key):
        for attempt in range(len(source) if train else 1):
            cut = lambda record: {"image": crop(record, seed, key)}  # noqa: E731
            made = read((key + attempt) % len(source), cut)
            if made is not None:
                return made
        return None

    def all_images(keys):
        batch = np.empty((len(keys), image_size, image_size, 3), np.uint8)
        for row, key in zip(batch, keys.tolist(), strict=True):
            row[...] = image(key)["image"]
        return {"image": batch}

    def make(local):
        if train:
            # A thread makes a whole batch: Grain's work on every element is Python's.
            options = grain.ReadOptions(num_threads, prefetch_buffer_size=num_threads)
            keys = local.batch(batch_size, drop_remainder=True, batch_fn=np.array)
            return keys.map(all_images).to_iter_dataset(options)
        options = grain.ReadOptions(num_threads, prefetch_buffer_size=2 * batch_size)
        elements = local.map(image).to_iter_dataset(options)
        return elements.batch(batch_size, drop_remainder=True)

    return order.Batches(places, make, len(source), batch_size, process_index, process_count)


def code_dataset(
    sources: CodesSource | Sequence[CodesSource],
    batch_size: int,
    seed: int,
    null_text_rate: float,
    train: bool,
    *,
    weights: Sequence[float] | None = None,
    captions: str = "first",
    with_ids: bool = False,
    process_index: int | None = None,
    process_count: int | None = None,
) -> order.Batches:
    """Batches of cached codes with what they are conditioned on, for the denoiser.

    In training, which crop and caption of a record is taken, and whether the caption (or label) is
    emptied, is a function of (seed, record, epoch) alone. In evaluation the crop is the first, and
    nothing is emptied.

    Args:
      sources: caches of one autoencoder; several are mixed.
      batch_size: B, records in a batch of this process.
      seed: of shuffling and choices, 0 to 2**32 - 1.
      null_text_rate: probability of the empty caption or label in training, 0 to 1.
      train: endless and shuffled; else one cache once, in order, without the last incomplete batch.
      weights: shares of several sets; None is by their numbers of records.
      captions: of evaluation: 'first', or 'all', which gives a record once with each caption.
      with_ids: add ``id`` int64 [B], the number of the record in its data set, ``set``, ``crop``
        and ``caption``, int64 [B].
      process_index, process_count: None asks JAX.

    Returns:
      An iterable of dicts, the state of which is in ``order``: ``codes`` int32 [B, N], and of sets
      with captions ``text_ids`` int32 [B, L] and, where they are cached, ``text_features`` float16
      [B, L, D]; of sets with labels ``label`` int32 [B], where the number of classes is the empty
      label; of sets with neither nothing else.

    Raises:
      UserError: caches that do not fit together, impossible weights, or fewer records than one
        batch.
      ValueError: a rate outside 0..1, several caches in evaluation, or other captions.
    """
    sources = [sources] if isinstance(sources, CodesSource) else list(sources)
    if not 0 <= null_text_rate <= 1:
        raise ValueError(f"null_text_rate is {null_text_rate}; it must lie in 0..1")
    if captions not in ("first", "all"):
        raise ValueError(f"captions is {captions!r}; it must be 'first' or 'all'")
    for other in sources[1:]:
        sources[0].require_same_layout(other)
    if train:
        places = order.shuffled([len(source) for source in sources], seed, weights)
        choose = TrainingChoice(sources, seed, null_text_rate)
        count = sum(map(len, sources))
    else:
        if len(sources) > 1:
            raise ValueError("several caches are evaluated one after the other")
        choose = _EvaluationChoice(sources[0], captions)
        count = choose.count
        places = grain.MapDataset.range(count)

    def gather(elements):
        return _gather(sources, choose(elements), with_ids)

    def make(local):
        # Batches of elements, then one gather a batch: a read of many records is a fast one.
        batches = local.batch(batch_size, drop_remainder=True, batch_fn=np.array).map(gather)
        # It is Python's work, of which two threads would do less than one.
        return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))

    return order.Batches(places, make, count, batch_size, process_index, process_count)


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


class TrainingChoice:
    """Elements of ``order.shuffled`` -> choices that are functions of (seed, set, key).

    Args:
      sources: the sets.
      seed: of the run.
      null_text_rate: probability of the empty caption or label.
    """

    def __init__(self, sources, seed, null_text_rate):
        self._sources, self._seed, self._null_text_rate = sources, seed, null_text_rate

    def __call__(self, elements: np.ndarray) -> Choice:
        sets, keys = order.split_keys(elements, len(self._sources))
        rows, numbers = np.empty_like(keys), np.empty((3, len(keys)))
        for s, source in enumerate(self._sources):
            mine = sets == s
            rows[mine] = keys[mine] % len(source)
            numbers[:2, mine] = order.uniforms((self._seed, s) if s else self._seed, keys[mine])
            numbers[2, mine] = order.uniforms((self._seed, s, VIEW_STREAM), keys[mine], 1)
        return Choice(sets, rows, numbers[2], numbers[0], numbers[1] < self._null_text_rate)


class _EvaluationChoice:
    """Places -> the first crop, with the first caption or each in turn."""

    def __init__(self, source, captions):
        self._counts = None
        if captions == "all" and source.context_length:
            self._counts = source.caption_counts()
            self._starts = np.cumsum(self._counts) - self._counts
        self.count = len(source) if self._counts is None else int(self._counts.sum())

    def __call__(self, elements: np.ndarray) -> Choice:
        rows, caption = elements, np.zeros(len(elements))
        if self._counts is not None:
            rows = np.searchsorted(self._starts, elements, side="right") - 1
            # Into the middle of the caption's share of [0, 1), so that rounding cannot miss it.
            caption = (elements - self._starts[rows] + 0.5) / self._counts[rows]
        zeros = np.zeros(len(elements))
        return Choice(np.zeros_like(elements), rows, zeros, caption, zeros.astype(bool))


def _gather(sources: list[CodesSource], choice: Choice, with_ids: bool) -> dict[str, np.ndarray]:
    layout, size = sources[0], len(choice.rows)
    batch = {"codes": np.empty((size, layout.num_tokens), np.int32)}
    if layout.context_length:
        batch["text_ids"] = np.empty((size, layout.context_length), np.int32)
    if layout.feature_width:
        shape = (size, layout.context_length, layout.feature_width)
        batch["text_features"] = np.empty(shape, np.float16)
    if layout.num_classes:
        batch["label"] = np.empty(size, np.int32)
    if with_ids:
        batch |= {key: np.empty(size, np.int64) for key in ("id", "crop", "caption")}
        batch["set"] = choice.sets
    for s, source in enumerate(sources):
        (mine,) = np.nonzero(choice.sets == s)
        if len(mine):
            found = source.take(choice.rows[mine], choice.crop[mine], choice.caption[mine])
            for key in batch.keys() & found.keys():
                batch[key][mine] = found[key]
    _empty(batch, choice.null, layout)
    return batch


def _empty(batch: dict[str, np.ndarray], null: np.ndarray, layout: CodesSource) -> None:
    """Replaces the conditions of the rows ``null``, bool [B], by those of no condition."""
    if layout.context_length:
        batch["text_ids"][null] = layout.null_text_ids
    if layout.feature_width:
        batch["text_features"][null] = layout.null_features
    if layout.num_classes:
        batch["label"][null] = layout.num_classes
