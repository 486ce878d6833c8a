"""How much a caption tells the model about its picture: bits a token, right and shuffled.

Letters: R pictures, B batch, N image tokens, L text tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np


class CaptionLikelihood(NamedTuple):
    """Bound on -log2 p(codes | caption), bits a token, over the same pictures.

    Attributes:
      right: mean with each picture's own caption.
      shuffled: mean with the caption of another picture, under the same noise.
      difference_in_standard_errors: mean of (shuffled - right) over its standard error, pictures
        taken as independent.
    """

    right: float
    shuffled: float
    difference_in_standard_errors: float


def derangement(count: int, seed: int) -> np.ndarray:
    """A random permutation of 0..count-1 in which nothing stays in its place (count >= 2)."""
    order = np.random.default_rng(seed).permutation(count)
    result = np.empty(count, np.int64)
    result[order] = np.roll(order, 1)
    return result


def caption_likelihood(
    bits: Callable[[jax.Array, np.ndarray, np.ndarray], jax.Array],
    codes: np.ndarray,
    conditions: np.ndarray,
    *,
    seed: int,
    batch_size: int,
) -> CaptionLikelihood:
    """Bounds the likelihood of pictures with right and with shuffled captions.

    Args:
      bits: (key, codes [B, N], conditions [B, ...]) -> bits a token [B]; compiled.
      codes: int32 [R, N].
      conditions: int32 [R, L] or [R], the caption or the class of each picture.
      seed: decides the noise and the shuffling; the same for every call that is to be compared.
      batch_size: B.
    """
    other = conditions[derangement(len(codes), seed)]
    right, shuffled = [], []
    for batch, start in enumerate(range(0, len(codes), batch_size)):
        rows = slice(start, start + batch_size)
        key = jax.random.fold_in(jax.random.key(seed), batch)
        count = len(codes[rows])
        pad = lambda x, n=batch_size - count: np.concatenate([x, x[:1].repeat(n, 0)])  # noqa: E731
        for results, given in ((right, conditions[rows]), (shuffled, other[rows])):
            results.append(np.asarray(bits(key, pad(codes[rows]), pad(given)))[:count])
    right, shuffled = np.concatenate(right), np.concatenate(shuffled)
    difference = shuffled - right
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    # Without any spread there is no scale to measure the difference on.
    in_errors = difference.mean() / error if error > 0 else 0.0
    return CaptionLikelihood(float(right.mean()), float(shuffled.mean()), float(in_errors))
