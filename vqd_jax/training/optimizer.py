"""AdamW with warm-up, cosine decay and clipping by global norm; averaged weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def learning_rate(
    peak: float, warmup_steps: int, num_steps: int, final_share: float = 0.0
) -> optax.Schedule:
    """Linear from 0 to ``peak`` over the warm-up, then a cosine down to ``final_share * peak``."""
    warmup_steps = min(warmup_steps, num_steps - 1)
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, warmup_steps, num_steps, end_value=final_share * peak
    )


def averaged(averages: Any, params: Any, decay: float, step: jax.Array) -> Any:
    """The averages of parameters after a step: average + (1 - decay) (parameter - average).

    Young averages forget their random start: the decay grows from 1/10 to its final value.

    Args:
      averages: of the step before.
      params: after this step, with the same structure.
      decay: the final one.
      step: int32 [], the steps taken before this one.
    """
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), averages, params)


def adamw(
    schedule: optax.Schedule,
    *,
    b1: float,
    b2: float,
    weight_decay: float,
    clip_norm: float,
    frozen: tuple[str, ...] = (),
) -> optax.GradientTransformation:
    """AdamW on clipped gradients; every parameter decays, as in the published code.

    Args:
      schedule: the learning rate of every step.
      b1, b2, weight_decay: of AdamW.
      clip_norm: largest global norm of the gradients.
      frozen: top-level names of parameters without a gradient; they neither decay nor have moments.
    """
    transform = optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay)
    if frozen:
        transform = optax.masked(
            transform,
            lambda params: {
                name: jax.tree.map(lambda _, learns=name not in frozen: learns, part)
                for name, part in params.items()
            },
        )
    return optax.chain(optax.clip_by_global_norm(clip_norm), transform)
