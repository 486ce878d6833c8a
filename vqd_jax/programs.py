"""The functions that ``pipeline.VQDiffusion`` compiles: pure, of parameters and arrays.

Letters: B batch, N image tokens, L text tokens, D text width, K codes, S image side.
"""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax.diffusion import sampler
from vqd_jax.models import autoencoder, conditioned
from vqd_jax.models.attention import ONE_DEVICE, Placement


def init(config: ConfigDict) -> Any:
    """Parameters of a whole model: those of ``models.conditioned`` and ``autoencoder``."""
    key = jax.random.key(0)
    params = conditioned.init_params(config_lib.model_config(config), key)
    codec = autoencoder.init_params(config_lib.autoencoder_config(config), key)
    return {**params, "autoencoder": codec}


@jax.jit
def image_keys(seed, pairs):
    """One key an image: a function of (seed, i, j)."""
    root = jax.random.fold_in(jax.random.key(seed), 2)
    fold = lambda pair: jax.random.fold_in(  # noqa: E731
        jax.random.fold_in(root, pair[0]), pair[1]
    )
    return jax.vmap(fold)(pairs)


def sample(
    params,
    keys,
    condition,
    null,
    settings,
    *,
    model_config,
    schedule,
    placement: Placement = ONE_DEVICE,
):
    """A ``sampler.Sample``, an image a key [B]; conditions [B, ...], the null one [1, ...]."""
    model = conditioned.bind(model_config, params, placement=placement)
    batch, grid = keys.shape[0], model_config.denoiser.grid
    if settings.guidance is not None:
        condition = sampler.pairs(condition, jnp.broadcast_to(null, condition.shape))
    # What does not depend on the tokens is computed once, before the scan over steps.
    context = model.context(condition)
    modulations = model.denoiser.modulations(jnp.arange(1, schedule.num_steps + 1))

    def predict_log_x0(tokens, time):
        # With a list of scales, some steps ask for the conditional rows alone.
        part = context
        if context is not None and tokens.shape[0] < condition.shape[0]:
            part = jax.tree.map(lambda x: x[:, ::2], context)
        return model.denoiser.denoise(tokens, modulations[:, time - 1], part)

    return sampler.sample(keys, predict_log_x0, (batch, grid[0] * grid[1]), schedule, settings)


def encode_text(params, ids, *, config, placement: Placement = ONE_DEVICE):
    """Features float32 [B, L, D] of ids int32 [B, L]."""
    model = conditioned.bind(config, params, placement=placement)
    return model.text_features(ids).astype(jnp.float32)


def log_x0(params, codes, condition, time, *, config, placement: Placement = ONE_DEVICE):
    """log p0 float32 [B, N, K] of tokens [B, N] at times [B], given features, labels or None."""
    denoiser = conditioned.bind(config, params, placement=placement).denoiser
    return jax.nn.log_softmax(denoiser(codes, time, condition))
