"""The reverse process: from all tokens masked to clean codes, one scan over a list of times.

Letters: B batch, N image tokens, K codes, S sampling steps, T steps of the schedule.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from vqd_jax.diffusion import transition
from vqd_jax.diffusion.schedule import Schedule

PredictX0 = Callable[[jax.Array, jax.Array], jax.Array]


class Settings(struct.PyTreeNode):
    """How to sample. Changing a number does not recompile; changing its presence does.

    Attributes:
      num_steps: S, network calls; times are spread evenly over 0..T. 0 means T.
      guidance: guidance scale, or None for no guidance (one network pass instead of two).
      truncation: keep the most likely codes whose better-ranked codes hold less than this share of
        the probability, or None for all (Improved VQ-Diffusion, section 3).
      temperature: divides the log-probabilities of the codes; 1 leaves them.
      trajectory: return the tokens after every step too.
    """

    num_steps: int = struct.field(pytree_node=False, default=0)
    guidance: float | None = None
    truncation: float | None = None
    temperature: float = 1.0
    trajectory: bool = struct.field(pytree_node=False, default=False)


class Sample(NamedTuple):
    """Codes int32 [B, N]; and, where asked for, the tokens after every step, int32 [S, B, N]."""

    codes: jax.Array
    trajectory: jax.Array | None


def step_times(num_steps: int, schedule: Schedule) -> np.ndarray:
    """int32 [S+1], decreasing from T to 0, as even as integers allow; num_steps 0 means T."""
    total = schedule.num_steps
    num_steps = num_steps or total
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps must lie in 1..{total} (the schedule's T), got {num_steps}")
    return np.round(np.linspace(total, 0, num_steps + 1)).astype(np.int32)


def guide(log_cond: jax.Array, log_null: jax.Array, scale: jax.Array) -> jax.Array:
    """Classifier-free guidance of code distributions (Improved VQ-Diffusion, equation 7).

    Args:
      log_cond, log_null: float32 [..., K], with and without the condition.
      scale: 1 gives log_cond back, 0 log_null.

    Returns:
      float32 [..., K], normalised.
    """
    return jax.nn.log_softmax(log_null + scale * (log_cond - log_null))


def truncate(log_x0: jax.Array, rate: jax.Array) -> jax.Array:
    """Keeps a code iff the codes ranked above it hold less than ``rate``; float32 [..., K].

    The most likely code always stays, and so does the one that crosses the rate; the rest becomes
    impossible. Normalised. The threshold is found by bisection, which needs no sorting.
    """
    p = jnp.exp(log_x0)

    def halve(bounds, _):
        low, high = bounds
        middle = 0.5 * (low + high)
        # A threshold is too low while the codes strictly above it still hold the rate.
        too_low = jnp.sum(jnp.where(log_x0 > middle, p, 0.0), -1, keepdims=True) >= rate
        return (jnp.where(too_low, middle, low), jnp.where(too_low, high, middle)), None

    top = log_x0.max(-1, keepdims=True)
    # Far below the least likely code that a float32 sum over K could notice.
    (_, threshold), _ = jax.lax.scan(halve, (top - 60.0, top), length=40)
    # A code stays if what is strictly above it holds less than the rate; the bisection has found
    # where that turns, to within rounding of log_x0, and the top code always stays.
    return jax.nn.log_softmax(jnp.where(log_x0 >= threshold, log_x0, transition.LOG_ZERO))


def sample(
    key: jax.Array,
    predict_log_x0: PredictX0,
    shape: tuple[int, int],
    schedule: Schedule,
    settings: Settings,
) -> Sample:
    """Samples codes, beginning with every token masked.

    Args:
      key: one PRNG key an image, [B]; an image depends on its own key only, whatever the batch.
      predict_log_x0: (tokens int32 [B, N], times int32 [B]) -> float32 [B, N, K]. With guidance it
        is called with 2B rows: the second half is to be answered without the condition.
      shape: (B, N).
      schedule: the schedule that the network was trained with.
      settings: see ``Settings``.

    Returns:
      ``Sample``.
    """
    batch, num_tokens = shape
    chex.assert_shape(key, (batch,))
    times = jnp.asarray(step_times(settings.num_steps, schedule))

    def predict(tokens, t):
        if settings.guidance is None:
            log_x0 = predict_log_x0(tokens, jnp.full(batch, t))
        else:
            both = predict_log_x0(jnp.concatenate([tokens, tokens]), jnp.full(2 * batch, t))
            log_x0 = guide(both[:batch], both[batch:], settings.guidance)
        log_x0 = jax.nn.log_softmax(log_x0.astype(jnp.float32) / settings.temperature)
        return log_x0 if settings.truncation is None else truncate(log_x0, settings.truncation)

    def step(tokens, pair):
        t, s = pair
        token_keys = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, s), num_tokens))(key)
        draw = jax.vmap(transition.draw_posterior, in_axes=(0, 0, 0, None, None, None))
        draw = jax.vmap(draw, in_axes=(0, 0, 0, None, None, None))
        tokens = draw(token_keys, predict(tokens, t), tokens, s, t, schedule).astype(jnp.int32)
        return tokens, tokens if settings.trajectory else None

    masked = jnp.full(shape, schedule.num_codes, jnp.int32)
    codes, trajectory = jax.lax.scan(step, masked, (times[:-1], times[1:]))
    return Sample(codes, trajectory)
