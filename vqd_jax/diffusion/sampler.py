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
      calls_per_step: network calls that share the tokens which a step reveals, for the rules that
        reveal a budget: more calls than the schedule has times. 2 is the published "time0.5".
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
    calls_per_step: int = struct.field(pytree_node=False, default=1)
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
        reveals, name = isinstance(self.rule, rules.Reveal), type(self.rule).__name__
        if self.calls_per_step > 1 and not reveals:
            raise ValueError(
                f"calls_per_step={self.calls_per_step}: {name} does a step in one call; "
                "high_quality, purity, confidence, halton, moment can share it out"
            )
        if self.start == "schedule" and reveals:
            raise ValueError(f"start='schedule': {name} takes no noise back, so it needs 'masked'")


def _is_share(x):
    return (0 < x) & (x <= 1)


# The values that a number of the settings may have, and how a message says so.
_POSSIBLE = {
    "guidance": (lambda x: (0 <= x) & (x < np.inf), "be finite and at least 0"),
    "truncation": (_is_share, "lie above 0 and up to 1"),
    "top_k": (lambda x: x >= 1, "be at least 1"),
    "calls_per_step": (lambda x: x >= 1, "be at least 1"),
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
    chain, steps = begin(key, shape, schedule, settings)
    # An image that begins before time T may have fewer times than there are steps.
    begins_later = settings.initial is not None or settings.known is not None

    def step(tokens, at):
        def move(tokens):
            log_x0 = _predict(predict_log_x0, tokens, at, settings)
            predictions = _likeliest(log_x0, settings)
            return _moved(key, log_x0, tokens, chain, at, schedule, settings), predictions

        def rest(tokens):
            # Where nothing is left to find, the tokens are the codes.
            return tokens, tokens if settings.trajectory else None

        if begins_later:
            tokens, predictions = jax.lax.cond(jnp.any(at.s < at.t), move, rest, tokens)
        else:
            tokens, predictions = move(tokens)
        return tokens, (tokens, predictions) if settings.trajectory else None

    codes, seen = jax.lax.scan(step, chain.tokens, steps)
    if seen is None:
        return Sample(codes, None, None)
    called = (steps.s < steps.t).any(axis=1)
    return Sample(codes, seen[0], seen[1][next_call(called)])


class Chain(NamedTuple):
    """Where the images of a batch are between two steps.

    Attributes:
      tokens: int32 [B, N].
      start: int32 [B], the time at which each image began.
      num_masked: int32 [B], how many of its tokens were masked then.
      masked_share: float32 [B], the probability that a token to be found was masked then.
    """

    tokens: jax.Array
    start: jax.Array
    num_masked: jax.Array
    masked_share: jax.Array


class Steps(NamedTuple):
    """Steps that follow each other.

    Attributes:
      number: int32 [S], counted from 1; it decides the noise of a step.
      t, s: int32 [S, B]; a step goes from time t to time s <= t, and s = t changes nothing.
      part: float32 [S], how much of a step is done after this call; see ``rules.Step``.
      scale: float32 [S], of the guidance, or None.
    """

    number: jax.Array
    t: jax.Array
    s: jax.Array
    part: jax.Array
    scale: jax.Array | None


class Answer(NamedTuple):
    """What the network said when it was called last, after guidance, truncation and the like.

    Attributes:
      candidates: int32 [B, N, C], the likeliest codes of every token, the best first.
      probabilities: float32 [B, N, C], theirs.
      confidence: float32 [B, N], the probability of the code that is there now, or of the likeliest
        one where the mask is.
    """

    candidates: jax.Array
    probabilities: jax.Array
    confidence: jax.Array


def begin(
    key: jax.Array, shape: tuple[int, int], schedule: Schedule, settings: Settings
) -> tuple[Chain, Steps]:
    """The first tokens of a chain, and its steps; arguments as for ``sample``."""
    times = _times(shape, schedule, settings)
    tokens, masked_share = _first_tokens(key, times[0], shape, schedule, settings)
    num_masked = jnp.sum(tokens == schedule.num_codes, axis=1)
    scales, num_steps, calls = settings.guidance, len(times) - 1, settings.calls_per_step
    if scales is not None:
        scales = jnp.broadcast_to(jnp.asarray(scales, jnp.float32), num_steps).repeat(calls)
    t, s = (x.repeat(calls, axis=0) for x in (times[:-1], times[1:]))
    parts = jnp.tile(jnp.arange(1, calls + 1) / calls, num_steps)
    steps = Steps(jnp.arange(1, num_steps * calls + 1), t, s, parts, scales)
    return Chain(tokens, times[0], num_masked, masked_share), steps


def advance(
    key: jax.Array,
    predict_log_x0: PredictX0,
    chain: Chain,
    steps: Steps,
    schedule: Schedule,
    settings: Settings,
    num_candidates: int = 5,
) -> tuple[Chain, Answer, tuple[jax.Array, jax.Array] | None]:
    """Some of the steps of a chain: together they make the tokens that ``sample`` makes.

    Args:
      key, predict_log_x0, schedule: of ``sample``.
      chain, steps: of ``begin``, or what is left of them. Steps in which nothing changes may fill
        up the end; they call no network. One program serves all steps of one number.
      settings: of ``begin``; what ``steps`` say already may be left out.
      num_candidates: C, at most K.

    Returns:
      The chain after the steps; the last answer of the network; and, if ``settings.trajectory``,
      the tokens and the likeliest codes of every step, int32 [S, B, N] each.
    """
    changes = (steps.s < steps.t).any(axis=1)
    is_last = jnp.arange(len(changes)) == len(changes) - 1 - jnp.argmax(changes[::-1])
    shape = (*chain.tokens.shape, min(num_candidates, schedule.num_codes))
    nothing = Answer(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(chain.tokens.shape))

    def step(carry, at):
        at, changes, is_last = at

        def move(tokens, answer):
            log_x0 = _predict(predict_log_x0, tokens, at, settings)
            moved = _moved(key, log_x0, tokens, chain, at, schedule, settings)
            answer = jax.lax.cond(
                is_last, lambda: _answer(log_x0, moved, shape[-1]), lambda: answer
            )
            return (moved, answer), _likeliest(log_x0, settings)

        def rest(tokens, answer):
            return (tokens, answer), jnp.zeros_like(tokens) if settings.trajectory else None

        carry, predictions = jax.lax.cond(changes, move, rest, *carry)
        return carry, (carry[0], predictions) if settings.trajectory else None

    carry, seen = jax.lax.scan(step, (chain.tokens, nothing), (steps, changes, is_last))
    return chain._replace(tokens=carry[0]), carry[1], seen


def _moved(key, log_x0, tokens, chain, at, schedule, settings):
    """Tokens [B, N] after the step ``at``, one of ``Steps``."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key, at.number)
    rule = jax.vmap(settings.rule, in_axes=(0, 0, 0, 0, None))
    part = jnp.broadcast_to(at.part, at.t.shape)
    step = rules.Step(at.s, at.t, chain.start, chain.num_masked, chain.masked_share, part)
    moved = jnp.where((at.s < at.t)[:, None], rule(keys, log_x0, tokens, step, schedule), tokens)
    return _restore(moved, schedule, settings)


def _likeliest(log_x0, settings):
    """The most likely clean codes [B, N], if they are asked for."""
    return log_x0.argmax(-1).astype(jnp.int32) if settings.trajectory else None


def _answer(log_x0, tokens, num_candidates):
    best, candidates = jax.lax.top_k(log_x0, num_candidates)
    # The likeliest code is the first candidate, too, but if that is read here, XLA on a CPU sorts
    # all K codes.
    shown = jnp.where(tokens < log_x0.shape[-1], tokens, log_x0.argmax(-1))
    there = jnp.take_along_axis(log_x0, shown[..., None], axis=-1)[..., 0]
    return Answer(candidates, jnp.exp(best), jnp.exp(there))


def next_call(called: jax.Array) -> jax.Array:
    """int32 [S]: of every step the one that calls the network next; ``called`` is bool [S].

    A step without a call has the answer of the call that follows: its tokens and its time are the
    same.
    """
    index = jnp.where(called, jnp.arange(len(called)), len(called) - 1)
    return jax.lax.cummin(index, reverse=True)


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


def _predict(predict_log_x0, tokens, at, settings):
    """log p0 [B, N, K] at the step ``at``, one of ``Steps``."""
    t, scale = at.t, at.scale

    def conditional():
        return shape_x0(predict_log_x0(tokens, t), settings)

    def guided():
        return shape_x0(predict_log_x0(pairs(tokens, tokens), pairs(t, t)), settings, scale)

    if scale is None:
        return conditional()
    if jnp.ndim(settings.guidance) == 0:
        return guided()
    return jax.lax.cond(scale == 1, conditional, guided)
