"""The train state of stage two and the pure step that moves it.

Letters: B batch, N image tokens, L text positions, A parts of a batch, S steps of one call.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax.diffusion import objective
from vqd_jax.interop import pretrained
from vqd_jax.models import conditioned
from vqd_jax.models.attention import ONE_DEVICE, Placement
from vqd_jax.parallel import sharding
from vqd_jax.training import optimizer

# What a batch calls the condition of the denoiser, by config.denoiser.condition.
CONDITION_KEYS = {"text": "text_ids", "class": "label", "none": None}


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
    frozen = ("text_encoder",) if config_lib.model_config(config).freeze_text_encoder else ()
    return optimizer.adamw(
        rate,
        b1=c.adam_b1,
        b2=c.adam_b2,
        weight_decay=c.weight_decay,
        clip_norm=c.clip_norm,
        frozen=frozen,
    ), rate


def create_state(config: ConfigDict) -> TrainState:
    """The state before the first step, decided by ``config.seed``; wrap it in ``jax.jit``."""
    init_key, key = jax.random.split(jax.random.key(config.seed))
    params = conditioned.init_params(config_lib.model_config(config), init_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy: a donated state must not hold one buffer twice.
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=_optimizer(config)[0].init(params),
        time_statistics=objective.init_time_statistics(config.diffusion.num_steps),
        key=key,
    )


def adopt(config: ConfigDict, state: TrainState) -> TrainState:
    """The state with the trained weights that the config names; see ``pretrained.load_initial``.

    Every value goes to where the one that it replaces lives.
    """
    found = pretrained.load_initial(config, state.params)
    if not found:
        return state

    def put(new, old):
        return jax.device_put(new, old.sharding)

    def placed(params):
        return params | {n: jax.tree.map(put, part, params[n]) for n, part in found.items()}

    # Two copies: a donated state must not hold one buffer twice.
    return state.replace(params=placed(state.params), ema_params=placed(state.ema_params))


def abstract_state(config: ConfigDict, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and places on the mesh of the state; nothing is allocated."""
    abstract = jax.eval_shape(functools.partial(create_state, config))
    return sharding.with_shardings(abstract, sharding.shardings(abstract, mesh))


def state_shardings(config: ConfigDict, mesh: Mesh) -> TrainState:
    """The places of the leaves of the state."""
    return jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))


def abstract_batch(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and places on the mesh of one batch; see ``train_step``."""
    size, placed = config.training.batch_size, sharding.batch_sharding(mesh)
    grid = config_lib.model_config(config).denoiser.grid
    shapes = {
        "codes": (size, grid[0] * grid[1]),
        "text_ids": (size, config.text_encoder.context_length),
        "label": (size,),
    }
    wanted = "codes", CONDITION_KEYS[config.denoiser.condition]
    batch = {
        key: jax.ShapeDtypeStruct(shapes[key], jnp.int32, sharding=placed) for key in wanted if key
    }
    if config.data.cache_text_features:
        shape = (*shapes["text_ids"], config.text_encoder.width)
        batch["text_features"] = jax.ShapeDtypeStruct(shape, jnp.float16, sharding=placed)
    return batch


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    config: ConfigDict,
    placement: Placement = ONE_DEVICE,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step: noise, predict, bound, AdamW, EMA. Pure; compile it with ``jit_train_step``.

    Args:
      state: the state; its time statistics decide which times are drawn.
      batch: ``codes`` int32 [B, N] and, by condition, ``text_ids`` int32 [B, L] or ``label``
        int32 [B]; maybe ``text_features`` [B, L, text width], what the text encoder makes of the
        ids.
      config: the resolved config.
      placement: of the model on several devices.

    Returns:
      The next state and float32 scalars: ``loss`` (nats a token), ``bound_bits`` (the variational
      bound in bits a token), ``accuracy`` of the most likely codes, ``gradient_norm`` before
      clipping, ``learning_rate``.
    """
    key = jax.random.fold_in(state.key, state.step)
    parts = config.training.gradient_accumulation
    if parts == 1:
        gradients, statistics, values = _gradients(
            state.params, state.time_statistics, key, batch, config, placement
        )
    else:
        gradients, statistics, values = _accumulate(state, key, batch, config, parts, placement)
    transform, rate = _optimizer(config)
    metrics = values | {"learning_rate": rate(state.step)}
    with jax.named_scope("optimizer"):
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        updates, opt_state = transform.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # Young averages forget their random start: the decay grows from 1/10 to its final value.
        decay = jnp.minimum(config.training.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema_params = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema_params, params)
    return state.replace(
        step=state.step + 1,
        params=params,
        ema_params=ema_params,
        opt_state=opt_state,
        time_statistics=statistics,
    ), metrics


def _gradients(params, statistics, key, batch, config, placement=ONE_DEVICE):
    """Gradients, updated time statistics and metrics of the objective on one batch."""
    condition = batch.get(CONDITION_KEYS[config.denoiser.condition])
    if condition is not None:
        chex.assert_equal(batch["codes"].shape[0], condition.shape[0])
    model_config = config_lib.model_config(config)

    def loss_fn(params):
        model = conditioned.bind(model_config, params, placement=placement)
        return objective.variational_bound(
            key,
            lambda tokens, time: model.log_x0(tokens, time, condition, batch.get("text_features")),
            batch["codes"],
            config_lib.noise_schedule(config),
            statistics,
            auxiliary_weight=config.training.auxiliary_weight,
        )

    (loss, aux), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return (
        gradients,
        aux["statistics"],
        {"loss": loss, "bound_bits": aux["bound"] / jnp.log(2.0), "accuracy": aux["accuracy"]},
    )


def _accumulate(state, key, batch, config, parts, placement=ONE_DEVICE):
    """``_gradients`` as the mean over parts of the batch, one after the other."""
    # Part a has the rows a, a + A, ...: every device keeps the rows that it has.
    split = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731

    def part(carry, at):
        statistics, total = carry
        index, rows = at
        gradients, statistics, values = _gradients(
            state.params, statistics, jax.random.fold_in(key, index), rows, config, placement
        )
        new = jax.tree.map(lambda t, g: t + g / parts, total, (gradients, values))
        return (statistics, new), None

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    values = dict.fromkeys(("loss", "bound_bits", "accuracy"), jnp.float32(0.0))
    start = state.time_statistics, (zeros, values)
    rows = jnp.arange(parts), jax.tree.map(split, batch)
    (statistics, (gradients, values)), _ = jax.lax.scan(part, start, rows)
    return gradients, statistics, values


def jit_train_step(config: ConfigDict, mesh: Mesh) -> Callable:
    """The compiled step, on one device or on thousands; it consumes the state it is given.

    With ``config.training.steps_per_call`` S > 1 it is S steps: the leaves of the batch have S as
    an axis before their rows, and so have the metrics.
    """
    placed = state_shardings(config, mesh)
    step = functools.partial(train_step, config=config, placement=sharding.placement(mesh))
    several = config.training.steps_per_call > 1
    return jax.jit(
        (lambda state, batches: jax.lax.scan(step, state, batches)) if several else step,
        donate_argnums=0,
        in_shardings=(placed, sharding.batch_sharding(mesh, leading=int(several))),
        out_shardings=(placed, sharding.replicated(mesh)),
    )


def lower_train_step(config: ConfigDict, mesh: Mesh) -> jax.stages.Lowered:
    """The step, ready to be compiled for devices that need not be there; nothing is allocated."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.training.steps_per_call = 1
    step = jit_train_step(config, mesh)
    return step.lower(abstract_state(config, mesh), abstract_batch(config, mesh))
