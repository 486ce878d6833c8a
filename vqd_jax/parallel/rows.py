"""Rows of host arrays in batches of one size, so that each function is compiled for one shape.

Letters: R rows, B batch.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


def padded(tree: Any, size: int) -> Any:
    """NumPy arrays [R, ...] with R <= B = ``size`` -> [B, ...]; the first row fills the rest."""

    def pad(rows):
        missing = size - len(rows)
        return np.concatenate([rows, rows[:1].repeat(missing, axis=0)]) if missing else rows

    return jax.tree.map(pad, tree)


def sizes(largest: int, multiple_of: int = 1) -> list[int]:
    """Rows that a batch may have: B, B/4, B/16 ... 1, so that few shapes are compiled.

    Args:
      largest: B.
      multiple_of: devices that share a batch; every size is rounded up to a multiple.
    """
    found = [largest]
    while found[-1] > 1:
        found.append(math.ceil(found[-1] / 4))
    return sorted({multiple_of * math.ceil(x / multiple_of) for x in found}, reverse=True)


def few_shapes(tree: Any, largest: int, multiple_of: int = 1) -> Iterator[tuple[Any, range]]:
    """Batches of all rows, each of one of ``sizes``, at least three quarters full if not the least.

    Yields:
      Arrays [B, ...] and the numbers of the rows that count.
    """
    num_rows, start = len(jax.tree.leaves(tree)[0]), 0
    while start < num_rows:
        left, possible = num_rows - start, sizes(largest, multiple_of)
        size = next((x for x in possible if 4 * left >= 3 * x), possible[-1])
        end = min(start + size, num_rows)
        yield padded(jax.tree.map(lambda x, a=start, b=end: x[a:b], tree), size), range(start, end)
        start = end


def even_size(num_rows: int, largest: int, multiple_of: int = 1) -> int:
    """Rows a batch, so that all batches are about equal: 20 rows of at most 16 are 10 and 10.

    Args:
      num_rows: R >= 1.
      largest: B is at most this, rounded up to a multiple of ``multiple_of``.
      multiple_of: devices that share a batch.
    """
    size = math.ceil(num_rows / math.ceil(num_rows / largest))
    return multiple_of * math.ceil(size / multiple_of)


def batches(tree: Any, size: int) -> Iterator[tuple[Any, int]]:
    """(arrays [B, ...], rows that count) for consecutive batches of arrays [R, ...]."""
    num_rows = len(jax.tree.leaves(tree)[0])
    for start in range(0, num_rows, size):
        part = jax.tree.map(lambda rows, start=start: rows[start : start + size], tree)
        yield padded(part, size), min(size, num_rows - start)


def in_batches(run: Callable[[Any], Any], tree: Any, size: int) -> np.ndarray:
    """``run`` over all rows: arrays [R, ...] -> one NumPy array [R, ...].

    Args:
      run: takes arrays [B, ...] and returns an array [B, ...]; compiled once.
      tree: NumPy arrays [R, ...], R >= 1.
      size: B.
    """
    return np.concatenate([np.asarray(run(part))[:count] for part, count in batches(tree, size)])
