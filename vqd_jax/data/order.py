"""The order of the records, which is the same on any number of processes, and a place in it.

Letters: B batch (of this process), P processes.

Every epoch is shuffled anew, the epochs follow each other without a gap, and several sets are mixed
by weight. An epoch has every record once, or as often as the records' own weights say. The places
of this endless order are numbered. Batch b of process p has the places
``(b P + p) B ... (b P + p + 1) B - 1``. A step therefore sees the same records, in the same order,
on any number of processes, and a checkpoint keeps one number: the records that all processes have
consumed.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np

from vqd_jax.errors import UserError


def uniforms(seed: int | Sequence[int], keys: np.ndarray, count: int = 2) -> np.ndarray:
    """Numbers in [0, 1) that are a function of (seed, key): SplitMix64.

    This generator counts instead of being seeded: seeding NumPy's own for each record would cost
    more than everything else in the chain.

    Args:
      seed: non-negative; another sequence of integers is another stream.
      keys: non-negative integers [B].
      count: numbers of each key.

    Returns:
      float64 [count, B].
    """
    gamma = np.uint64(0x9E3779B97F4A7C15)
    start = _start(seed if isinstance(seed, int) else tuple(seed))
    steps = np.arange(1, count + 1, dtype=np.uint64)[:, None]
    z = start + gamma * (np.uint64(count) * keys.astype(np.uint64) + steps)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)) * 2.0**-53


@functools.lru_cache(maxsize=64)
def _start(seed: int | tuple[int, ...]) -> np.uint64:
    return np.uint64(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])


def shuffled(
    counts: Sequence[int],
    seed: int,
    weights: Sequence[float] | None = None,
    record_weights: np.ndarray | None = None,
) -> grain.MapDataset:
    """The endless order of training: an element for every place.

    Args:
      counts: records of each set.
      seed: 0 to 2**32 - 1.
      weights: positive shares of the sets; None is by their numbers of records.
      record_weights: of the first set, float64 [count], such as ``balanced_weights``; one of 0
        leaves its record out. None are equal ones.

    Returns:
      Integers ``key * len(counts) + set``, which ``split_keys`` takes apart. No key comes twice in
      a set, and ``key % count`` is the record.

    Raises:
      UserError: the weights are not one positive number for each set, or a set is empty.
    """
    weights = list(counts if weights is None else weights)
    if len(weights) != len(counts) or not all(0 < w < np.inf for w in weights):
        raise UserError(f"weights are {weights}; give one positive number to each data set")
    if min(counts) < 1:
        raise UserError(f"the data sets have {list(counts)} records; an empty one cannot be mixed")
    parts = [_epochs(count, s, len(counts), seed) for s, count in enumerate(counts)]
    if record_weights is not None:
        if len(record_weights) != counts[0]:
            raise UserError(f"{len(record_weights)} weights do not fit {counts[0]} records")
        parts[0] = parts[0].map(_Weighted(record_weights, len(counts), seed))
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)


def _epochs(count: int, index: int, num_sets: int, seed: int) -> grain.MapDataset:
    # Grain shuffles epoch e by seed + e, so sets need seeds that are far apart.
    own_seed = int(np.random.SeedSequence((seed, index)).generate_state(1)[0]) if index else seed

    def element(place, _):
        # The place, unlike the element that stands there, goes on counting in later epochs.
        return place * num_sets + index

    return grain.MapDataset.range(count).map_with_index(element).seed(own_seed).shuffle().repeat()


class _Weighted:
    """Replaces the records of an epoch by those that their weights call for.

    Place i of an epoch of R records takes the record in which (i + offset) / R falls, where each
    record covers an interval of its share. So a record of weight w comes floor(R w) or ceil(R w)
    times in an epoch. The offset of epoch e is the fractional part of e times the golden ratio,
    which visits every part of [0, 1) equally often: rare records take turns.
    """

    _GOLDEN = 0.5 * (5.0**0.5 - 1.0)

    def __init__(self, weights: np.ndarray, num_sets: int, seed: int):
        weights = np.asarray(weights, np.float64)
        # Records of one weight stand in random order. In the order of the set, places that are a
        # fixed distance apart would always take the same kind, such as one skin tone.
        mixed = np.random.default_rng(seed).permutation(len(weights))
        self._records = mixed[np.argsort(weights[mixed], kind="stable")]
        shares = weights[self._records] / weights.sum()
        self._ends = np.cumsum(shares) * len(weights)
        self._num_sets = num_sets

    def __call__(self, element: int) -> int:
        place, index = divmod(int(element), self._num_sets)
        count = len(self._records)
        epoch, slot = divmod(place, count)
        point = slot + epoch * self._GOLDEN % 1.0
        found = min(int(np.searchsorted(self._ends, point, side="right")), count - 1)
        return (place * count + int(self._records[found])) * self._num_sets + index


def balanced_weights(groups: Sequence[str], power: float) -> np.ndarray:
    """Weights with which every group has a share in proportion to its size to a power.

    Args:
      groups: the group of each record.
      power: 1 leaves the records equal, 0 makes the groups equal.

    Returns:
      float64 [records]: n^(power - 1), for a group of n records.
    """
    _, inverse, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    return sizes[inverse].astype(np.float64) ** (power - 1.0)


def split_keys(elements: np.ndarray, num_sets: int) -> tuple[np.ndarray, np.ndarray]:
    """Elements of ``shuffled``, integers [B] -> sets [B] and keys [B]."""
    keys, sets = np.divmod(elements, num_sets)
    return sets, keys


class Batches(grain.IterDataset):
    """The batches of one process, which go on at the exact record on any number of processes.

    Args:
      places: random-access elements; each has a place.
      make: elements of this process -> its batches, B elements each, in order.
      num_records: different records in the order.
      batch_size: B.
      process_index, process_count: p and P; None asks JAX.

    Raises:
      UserError: fewer records than one batch of all processes.
    """

    def __init__(
        self,
        places: grain.MapDataset,
        make: Callable[[grain.MapDataset], grain.IterDataset],
        num_records: int,
        batch_size: int,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        super().__init__()
        self.batch_size = batch_size
        self.process_index = jax.process_index() if process_index is None else process_index
        self.process_count = jax.process_count() if process_count is None else process_count
        self._places = places
        self._make = make
        if num_records < self.global_batch_size:
            raise UserError(
                f"{num_records} records are too few for one batch of {batch_size} on each of "
                f"{self.process_count} processes; lower the batch size"
            )

    @property
    def global_batch_size(self) -> int:
        """Records that one step of all processes consumes."""
        return self.batch_size * self.process_count

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)

    def iterate_from(self, place: int) -> grain.DatasetIterator:
        """The batches of this process from the step on that begins at ``place``."""
        size, stride = self.batch_size, self.global_batch_size
        first = place + self.process_index * size
        # All processes have the same number of batches, or the last step would hang.
        count = (len(self._places) - place) // stride * size
        places = self._places
        local = grain.MapDataset.range(count).map(
            lambda i: places[first + i // size * stride + i % size]
        )
        return iter(self._make(local))


class BatchIterator(grain.DatasetIterator):
    """Iterator of ``Batches``; its state is ``{'records': those that all processes consumed}``."""

    def __init__(self, batches: Batches):
        super().__init__()
        self._batches = batches
        self.set_state({"records": 0})

    def __next__(self) -> Any:
        if self._inner is None:
            self._inner = self._batches.iterate_from(self._records)
        batch = next(self._inner)
        self._records += self._batches.global_batch_size
        return batch

    def get_state(self) -> dict[str, int]:
        """The place of the next batch."""
        return {"records": self._records}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to the place that ``get_state`` gave, on this or any other number of processes."""
        self._records = int(state["records"])
        self._inner = None


class Ahead(grain.DatasetIterator):
    """Batches that are on the devices, or on their way there, before they are asked for.

    Its state is that of the batches that were handed out, not of those that wait.

    Args:
      batches: iterates over host batches, such as those of ``Batches``.
      fetch: takes one batch, or several, from the iterator and begins their transfer.
      ahead: results that wait while one is used.
    """

    def __init__(
        self,
        batches: grain.DatasetIterator,
        fetch: Callable[[grain.DatasetIterator], Any],
        ahead: int = 2,
    ):
        super().__init__()
        self._batches, self._fetch, self._ahead = batches, fetch, ahead
        self._waiting = collections.deque()
        self._state = batches.get_state()

    def __next__(self) -> Any:
        while len(self._waiting) <= self._ahead:
            try:
                batch = self._fetch(self._batches)
            except StopIteration:
                break
            self._waiting.append((batch, self._batches.get_state()))
        if not self._waiting:
            raise StopIteration
        batch, self._state = self._waiting.popleft()
        return batch

    def get_state(self) -> dict[str, Any]:
        """The place of the next batch."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place; what was on its way is dropped."""
        self._batches.set_state(state)
        self._waiting.clear()
        self._state = state
