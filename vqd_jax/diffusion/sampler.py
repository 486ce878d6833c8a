"""The reverse process: from masked or noised tokens to clean codes, one scan over a list of times.

Letters: B batch, N image tokens, K codes, S sampling steps, T steps of the schedule.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from vqd_jax.diffusion import rules, transition
from vqd_jax.diffusion.schedule import Schedule
from vqd_jax.diffusion.shaping import (  # noqa: F401
    bisect,
    guide,
    interval,
    keep_top_k,
    ramp,
    shape_x0,
    truncate,
)

PredictX0 = Callable[[jax.Array, jax.Array], jax.Array]


class Settings(struct.PyTreeNode):
    """How to sample. Changing a number does not recompile; changing its presence does.

    Impossible numbers are refused with a ``ValueError`` when settings are made of them. Numbers
    that are JAX arrays already are taken as they are.

    Attributes:
      num_steps: S, network calls, spread evenly from the first time to 0. 0 means T.
      times: an increasing list of S+1 times from 0 to at most T to use instead.
      rule: what a step does; a callable of ``rules``.
      guidance: guidance scale, or one for every step, float32 [S] (``ramp``, ``interval``); or None
        for no guidance (one network pass instead of two).
      truncation: keep the most likely codes whose better-ranked codes hold less than this share of
        the probability, or None for all (Improved VQ-Diffusion, section 3.1).
      top_k: keep this many of the most likely codes, or None for all.
      temperature: divides the log-probabilities of the codes; 1 leaves them.
      known: int32 [B, N], codes that never change, and K where a code is to be found. Unless
        ``times`` or ``initial`` say otherwise an image starts at the time whose share of masked
        tokens it has.
      initial: int32 [B, N], codes to begin from instead of masks, noised by ``strength``.
      strength: share of T at which ``initial`` enters: 1 forgets it, 1/T leaves all but one step.
      start: the tokens that are neither known nor in ``initial`` begin "masked", or from the law of
        the schedule at time T ("schedule"): masked with probability C_T, else any code. None takes
        what suits the rule.
      trajectory: return the tokens and the most likely codes of every step too.
    """

    num_steps: int = struct.field(pytree_node=False, default=0)
    times: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)
    rule: Callable = rules.Ancestral()
    guidance: float | jax.Array | None = None
    truncation: float | None = None
    top_k: int | None = None
    temperature: float = 1.0
    known: jax.Array | None = None
    initial: jax.Array | None = None
    strength: float = 1.0
    start: str | None = struct.field(pytree_node=False, default=None)
    trajectory: bool = struct.field(pytree_node=False, default=False)

    def __post_init__(self):
        for name, (possible, range_) in _POSSIBLE.items():
            value = getattr(self, name)
            # JAX makes settings of tracers and of placeholders, too.
            known = isinstance(value, int | float | np.ndarray | np.generic)
            if known and not np.all(possible(np.asarray(value))):
                raise ValueError(f"{name}={value}: must {range_}")
        if self.start not in (None, "schedule", "masked"):
            raise ValueError(f"start={self.start!r}: must be schedule or masked")
        if self.start == "schedule" and isinstance(self.rule, rules.Reveal):
            name = type(self.rule).__name__
            raise ValueError(f"start='schedule': {name} takes no noise back, so it needs 'masked'")


def _is_share(x):
    return (0 < x) & (x <= 1)


# The values that a number of the settings may have, and how a message says so.
_POSSIBLE = {
    "guidance": (lambda x: (0 <= x) & (x < np.inf), "be finite and at least 0"),
    "truncation": (_is_share, "lie above 0 and up to 1"),
    "top_k": (lambda x: x >= 1, "be at least 1"),
    "temperature": (lambda x: (0 < x) & (x < np.inf), "be positive and finite"),
    "strength": (_is_share, "lie above 0 and up to 1"),
}


class Sample(NamedTuple):
    """What ``sample`` returns.

    Attributes:
      codes: int32 [B, N].
      trajectory: int32 [S, B, N], the tokens after every step (K is the mask), where asked for.
      predictions: int32 [S, B, N], the most likely clean codes at every step, where asked for.
    """

    codes: jax.Array
    trajectory: jax.Array | None
    predictions: jax.Array | None


def published_fast(speed: int, schedule: Schedule, **others) -> Settings:
    """Settings of the published "fast inference" at a speed >= 2; ``others`` go to ``Settings``."""
    if speed < 2 or speed > schedule.num_steps:
        raise ValueError(f"speed must lie in 2..{schedule.num_steps} (T), got {speed}")
    times = list(range(schedule.num_steps, 0, -speed))
    # A call at time 1 always ends it.
    times += [0] if times[-1] == 1 else [1, 0]
    return Settings(times=tuple(times[::-1]), rule=rules.PublishedFast(speed - 1), **others)


def step_times(num_steps: int, schedule: Schedule) -> np.ndarray:
    """int32 [S+1], decreasing from T to 0, as even as integers allow; num_steps 0 means T."""
    total = schedule.num_steps
    num_steps = num_steps or total
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps must lie in 1..{total} (the schedule's T), got {num_steps}")
    return even_times(np.int32(total), num_steps)


def even_times(start, num_steps: int):
    """int32 [S+1] from ``start`` [] down to 0, rounded up; times repeat where start < S."""
    return -(-np.arange(num_steps, -1, -1, dtype=np.int32) * start // num_steps)


def listed_times(times: tuple[int, ...], schedule: Schedule) -> np.ndarray:
    """int32 [S+1], the list of ``Settings.times`` decreasing; checked."""
    table = np.asarray(times)
    if len(times) < 2 or times[0] != 0 or (np.diff(table) <= 0).any():
        raise ValueError(f"times must be an increasing list that begins with 0, got {times}")
    if times[-1] > schedule.num_steps:
        raise ValueError(f"times end at {times[-1]}, after the schedule's T={schedule.num_steps}")
    return table[::-1].astype(np.int32)


def masked_time(share: jax.Array, schedule: Schedule) -> jax.Array:
    """The first time in 1..T with at least this share of the masks of time T: int32, any shape."""
    mask = jnp.asarray(schedule.mask)
    index = jnp.searchsorted(mask, share * mask[-1])
    return jnp.clip(index, 1, schedule.num_steps).astype(jnp.int32)


def sample(
    key: jax.Array,
    predict_log_x0: PredictX0,
    shape: tuple[int, int],
    schedule: Schedule,
    settings: Settings,
) -> Sample:
    """Samples codes: one call of the network and one of the rule for every step of an image.

    Args:
      key: one PRNG key an image, [B]; an image depends on its own key only, whatever the batch.
      predict_log_x0: (tokens int32 [B, N], times int32 [B]) -> float32 [B, N, K], log p0 or any
        logits of it. With guidance it is called with 2B rows, of which the odd ones are to be
        answered without the condition (see ``pairs``). With a list of scales it is called with B
        rows, all conditional, where the scale is 1.
      shape: (B, N).
      schedule: the schedule that the network was trained with.
      settings: see ``Settings``.

    Returns:
      ``Sample``.

    Raises:
      ValueError: impossible numbers of steps or times, or two settings that exclude each other.
    """
    chex.assert_shape(key, (shape[0],))
    times = _times(shape, schedule, settings)
    tokens, masked_share = _first_tokens(key, times[0], shape, schedule, settings)
    num_masked = jnp.sum(tokens == schedule.num_codes, axis=1)
    scales, numbers = settings.guidance, jnp.arange(1, len(times))
    if scales is not None:
        scales = jnp.broadcast_to(jnp.asarray(scales, jnp.float32), numbers.shape)

    def move(tokens, index, t, s, scale):
        log_x0 = _predict(predict_log_x0, tokens, t, scale, settings)
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key, index)
        rule = jax.vmap(settings.rule, in_axes=(0, 0, 0, 0, None))
        at = rules.Step(s, t, times[0], num_masked, masked_share)
        moved = jnp.where((s < t)[:, None], rule(keys, log_x0, tokens, at, schedule), tokens)
        predictions = log_x0.argmax(-1).astype(jnp.int32) if settings.trajectory else None
        return _restore(moved, schedule, settings), predictions

    def rest(tokens, *_):
        return tokens, jnp.zeros_like(tokens) if settings.trajectory else None

    # An image that begins before time T may have fewer times than there are steps.
    begins_later = settings.initial is not None or settings.known is not None

    def step(tokens, at):
        _, t, s, _ = at
        if begins_later:
            tokens, predictions = jax.lax.cond(jnp.any(s < t), move, rest, tokens, *at)
        else:
            tokens, predictions = move(tokens, *at)
        return tokens, (tokens, predictions) if settings.trajectory else None

    codes, seen = jax.lax.scan(step, tokens, (numbers, times[:-1], times[1:], scales))
    if seen is None:
        return Sample(codes, None, None)
    return Sample(codes, seen[0], _of_next_call(seen[1], times))


def _of_next_call(predictions, times):
    """Predictions [S, B, N] where a step without a call has those of the call that follows.

    They are its own: its tokens and its time are the same.
    """
    num_steps = len(predictions)
    called = (times[1:] < times[:-1]).any(axis=1)
    index = jnp.where(called, jnp.arange(num_steps), num_steps - 1)
    return predictions[jax.lax.cummin(index, reverse=True)]


def _times(shape, schedule, settings):
    """int32 [S+1, B], decreasing to 0."""
    for codes in (settings.known, settings.initial):
        if codes is not None:
            chex.assert_shape(codes, shape)
    if settings.times is not None:
        if settings.num_steps:
            raise ValueError("give either num_steps or times, not both")
        listed = listed_times(settings.times, schedule)
        return jnp.broadcast_to(listed[:, None], (len(listed), shape[0]))
    num_steps = len(step_times(settings.num_steps, schedule)) - 1
    start = jnp.full(shape[0], schedule.num_steps)
    if settings.initial is not None:
        steps = jnp.round(settings.strength * schedule.num_steps).astype(jnp.int32)
        start = jnp.full(shape[0], jnp.clip(steps, 1, schedule.num_steps))
    elif settings.known is not None:
        start = masked_time(jnp.mean(settings.known == schedule.num_codes, axis=1), schedule)
    return jax.vmap(lambda start: even_times(start, num_steps), out_axes=1)(start)


def _first_tokens(key, start, shape, schedule, settings):
    """Tokens int32 [B, N] to begin with at the times ``start`` [B].

    With them, for each image, the probability [B] that one that is not known is masked.
    """
    # Index 0 of an image's key is what it begins with; the steps have 1, 2, ...
    first = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key, 0)
    keys = jax.vmap(lambda k: jax.random.split(k, shape[1]))(first)
    mask = jnp.asarray(schedule.mask)
    if settings.initial is not None:
        noise = jax.vmap(transition.q_sample, in_axes=(0, 0, None, None))
        noise = jax.vmap(noise, in_axes=(0, 0, 0, None))
        tokens, masked_share = noise(keys, settings.initial, start, schedule), mask[start]
    elif (settings.start or getattr(settings.rule, "start", "schedule")) == "schedule":
        prior = jax.vmap(transition.draw_prior, in_axes=(0, None))
        tokens = jax.vmap(prior, in_axes=(0, None))(keys, schedule)
        masked_share = jnp.full(shape[0], mask[-1])
    else:
        tokens, masked_share = jnp.full(shape, schedule.num_codes, jnp.int32), jnp.ones(shape[0])
    return _restore(tokens, schedule, settings), masked_share


def _restore(tokens, schedule, settings):
    """Puts the known codes back."""
    if settings.known is None:
        return tokens.astype(jnp.int32)
    return jnp.where(settings.known < schedule.num_codes, settings.known, tokens).astype(jnp.int32)


def pairs(even: jax.Array, odd: jax.Array) -> jax.Array:
    """Two arrays [B, ...] in turns, [2B, ...]: of rows over several devices none has to move."""
    return jnp.stack([even, odd], axis=1).reshape(-1, *even.shape[1:])


def _predict(predict_log_x0, tokens, t, scale, settings):
    """log p0 [B, N, K] at times t [B]; the guidance ``scale`` [] or None."""

    def conditional():
        return shape_x0(predict_log_x0(tokens, t), settings)

    def guided():
        return shape_x0(predict_log_x0(pairs(tokens, tokens), pairs(t, t)), settings, scale)

    if scale is None:
        return conditional()
    if jnp.ndim(settings.guidance) == 0:
        return guided()
    return jax.lax.cond(scale == 1, conditional, guided)
