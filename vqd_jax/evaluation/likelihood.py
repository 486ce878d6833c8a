"""How much a condition tells the model about its picture: bits a token, right and shuffled.

Letters: R pictures, B batch, N image tokens, L text tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax.data.codes import CodesSource
from vqd_jax.diffusion import objective
from vqd_jax.models import conditioned
from vqd_jax.parallel import rows, sharding

BATCH = 64


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
    in_batches = rows.batches((codes, conditions, other), batch_size)
    for number, ((some, own, others), count) in enumerate(in_batches):
        key = jax.random.fold_in(jax.random.key(seed), number)
        for results, given in ((right, own), (shuffled, others)):
            results.append(np.asarray(bits(key, some, given))[:count])
    right, shuffled = np.concatenate(right), np.concatenate(shuffled)
    difference = shuffled - right
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    # Without any spread there is no scale to measure the difference on.
    in_errors = difference.mean() / error if error > 0 else 0.0
    return CaptionLikelihood(float(right.mean()), float(shuffled.mean()), float(in_errors))


def chosen(source: CodesSource, num_images: int, condition: str) -> tuple[np.ndarray, np.ndarray]:
    """The same pictures of a cache every time.

    Args:
      source: the cached codes.
      num_images: R, or all of a smaller cache.
      condition: "text", "class" or "none".

    Returns:
      The codes of the first crops, int32 [R, N], and the conditions: the ids of the first captions,
      int32 [R, L], or the labels, int32 [R], or zeros.
    """
    count = min(num_images, len(source))
    records = source.read(np.sort(np.random.default_rng(0).permutation(len(source))[:count]))
    given = {
        "text": lambda record: record.text_ids[0],
        "class": lambda record: record.label,
        "none": lambda record: 0,
    }[condition]
    codes = np.stack([record.codes[0] for record in records])
    return codes.astype(np.int32), np.stack(list(map(given, records))).astype(np.int32)


class Bound:
    """``caption_likelihood`` of a model on all devices of a mesh; compiled once.

    Args:
      config: the resolved config.
      mesh: the devices.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh):
        self._mesh = mesh
        sizes, schedule = config_lib.model_config(config), config_lib.noise_schedule(config)
        draws = min(config.evaluation.num_draws, schedule.num_steps)

        def bits(params, key_data, codes, conditions):
            model = conditioned.bind(sizes, params, placement=sharding.placement(mesh))
            key, predict = jax.random.wrap_key_data(key_data), model.predictor(conditions)
            return objective.likelihood(key, predict, codes, schedule, draws)

        self._bits = jax.jit(bits, out_shardings=sharding.replicated(mesh))

    def __call__(self, params: Any, codes: np.ndarray, conditions: np.ndarray) -> CaptionLikelihood:
        """The likelihood of pictures as ``chosen`` returns them."""

        def bits(key, *arrays):
            placed = sharding.put_rows(arrays, self._mesh)
            return self._bits(params, np.asarray(jax.random.key_data(key)), *placed)

        # The same size on all usual meshes, and with it the noise that the pictures meet.
        shards = sharding.num_row_shards(self._mesh)
        size = -(-BATCH // shards) * shards
        return caption_likelihood(bits, codes, conditions, seed=0, batch_size=size)
