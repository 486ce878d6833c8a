"""AdamW and Muon with warm-up, cosine decay and clipping by global norm; averaged weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from ml_collections import ConfigDict


def learning_rate(
    peak: float, warmup_steps: int, num_steps: int, final_share: float = 0.0
) -> optax.Schedule:
    """Linear from 0 to ``peak`` over the warm-up, then a cosine down to ``final_share * peak``."""
    warmup_steps = min(warmup_steps, num_steps - 1)
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, warmup_steps, num_steps, end_value=final_share * peak
    )


def make(
    c: ConfigDict, frozen: tuple[str, ...] = ()
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of ``config.training``, and its learning rate; ``frozen`` as in ``clipped``.

    Every parameter decays, as in the published code.
    """
    rate = learning_rate(c.learning_rate, c.warmup_steps, c.num_steps, c.final_learning_rate)
    kind = {"adamw": optax.adamw, "muon": muon}[c.optimizer]
    transform = kind(rate, b1=c.adam_b1, b2=c.adam_b2, weight_decay=c.weight_decay)
    return clipped(transform, c.clip_norm, frozen), rate


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


def muon(
    schedule: optax.Schedule, *, b1: float, b2: float, weight_decay: float
) -> optax.GradientTransformation:
    """Muon for the kernels of scanned layers; AdamW for tables, biases and the logits' kernel.

    Both have Nesterov's momentum. An update of a kernel is its momentum with all singular values
    brought near 1, by five steps of Newton and Schulz (Jordan et al. 2024). It is scaled to a root
    mean square of 0.2, about that of AdamW's updates, so that one learning rate serves both (Liu et
    al. 2025, arXiv:2502.16982, equation 4). Muon has one moment where AdamW has two.

    Args:
      schedule: the learning rate of every step.
      b1, b2: of AdamW.
      weight_decay: of both.
    """
    return optax.contrib.muon(
        schedule,
        weight_decay=weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        adam_weight_decay=weight_decay,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=0.2,
    )


def _matrices(params):
    """Where the kernels [layers, inputs, outputs] are; None at all other leaves."""

    def leaf(path, x):
        is_kernel = getattr(path[-1], "key", None) == "kernel" and x.ndim == 3
        return optax.contrib.MuonDimensionNumbers(1, 2) if is_kernel else None

    return jax.tree_util.tree_map_with_path(leaf, params)


def clipped(
    transform: optax.GradientTransformation, clip_norm: float, frozen: tuple[str, ...] = ()
) -> optax.GradientTransformation:
    """An optimizer on clipped gradients.

    Args:
      transform: the optimizer.
      clip_norm: largest global norm of the gradients.
      frozen: top-level names of parameters without a gradient; they neither decay nor have moments.
    """
    if frozen:
        transform = optax.masked(
            transform,
            lambda params: {
                name: jax.tree.map(lambda _, learns=name not in frozen: learns, part)
                for name, part in params.items()
            },
        )
    return optax.chain(optax.clip_by_global_norm(clip_norm), transform)
