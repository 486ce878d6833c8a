"""The train state of stage two and the pure step that moves it.

Letters: B batch, N image tokens, L text positions.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax.diffusion import objective
from vqd_jax.models import text_to_image
from vqd_jax.training import optimizer


class TrainState(struct.PyTreeNode):
    """Everything that a step reads or changes; a checkpoint of it is a complete one.

    Attributes:
      step: int32 [], steps taken.
      params, ema_params: nested dicts of float32 arrays.
      opt_state: moments of the optimizer.
      time_statistics: what importance sampling of t has learnt.
      key: PRNG key of the run; a step uses ``fold_in(key, step)``.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: optax.OptState
    time_statistics: objective.TimeStatistics
    key: jax.Array


def _optimizer(config: ConfigDict) -> tuple[optax.GradientTransformation, optax.Schedule]:
    c = config.training
    rate = optimizer.learning_rate(
        c.learning_rate, c.warmup_steps, c.num_steps, c.final_learning_rate
    )
    return optimizer.adamw(
        rate, b1=c.adam_b1, b2=c.adam_b2, weight_decay=c.weight_decay, clip_norm=c.clip_norm
    ), rate


def create_state(config: ConfigDict) -> TrainState:
    """The state before the first step, decided by ``config.seed``; wrap it in ``jax.jit``."""
    init_key, key = jax.random.split(jax.random.key(config.seed))
    params = text_to_image.init_params(config_lib.model_config(config), init_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy: a donated state must not hold one buffer twice.
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=_optimizer(config)[0].init(params),
        time_statistics=objective.init_time_statistics(config.diffusion.num_steps),
        key=key,
    )


def train_step(
    state: TrainState, batch: dict[str, jax.Array], *, config: ConfigDict
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step: noise, predict, bound, AdamW, EMA. Pure; compile it with ``jit_train_step``.

    Args:
      state: the state; its time statistics decide which times are drawn.
      batch: ``codes`` int32 [B, N] and ``text_ids`` int32 [B, L].
      config: the resolved config.

    Returns:
      The next state and float32 scalars: ``loss`` (nats a token), ``bound_bits`` (the variational
      bound in bits a token), ``accuracy`` of the most likely codes, ``gradient_norm`` before
      clipping, ``learning_rate``.
    """
    chex.assert_equal(batch["codes"].shape[0], batch["text_ids"].shape[0])
    model_config = config_lib.model_config(config)
    schedule = config_lib.noise_schedule(config)
    key = jax.random.fold_in(state.key, state.step)

    def loss_fn(params):
        model = text_to_image.bind(model_config, params)
        return objective.variational_bound(
            key,
            lambda tokens, time: model.log_x0(tokens, time, batch["text_ids"]),
            batch["codes"],
            schedule,
            state.time_statistics,
            auxiliary_weight=config.training.auxiliary_weight,
        )

    (loss, aux), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    transform, rate = _optimizer(config)
    updates, opt_state = transform.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # Young averages forget their random start: the decay grows from 1/10 towards its final value.
    decay = jnp.minimum(config.training.ema_decay, (1.0 + state.step) / (10.0 + state.step))
    metrics = {
        "loss": loss,
        "bound_bits": aux["bound"] / jnp.log(2.0),
        "accuracy": aux["accuracy"],
        "gradient_norm": optax.tree.norm(gradients),
        "learning_rate": rate(state.step),
    }
    return state.replace(
        step=state.step + 1,
        params=params,
        ema_params=jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema_params, params),
        opt_state=opt_state,
        time_statistics=aux["statistics"],
    ), metrics


def jit_train_step(config: ConfigDict):
    """The compiled step; it consumes the state it is given."""
    return jax.jit(functools.partial(train_step, config=config), donate_argnums=0)
