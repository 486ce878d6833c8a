"""The programs that draw codes, whole or in segments, and what they give back.

A segment is some of the steps of a chain. After each a ``Preview`` shows how far the pictures are.
The codes are the same as those of a whole call.

Letters: P prompts, J images of each prompt, B batch, N image tokens, L text tokens, D text width,
K codes, S image side, C candidates of a token, F sampling steps.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vqd_jax.diffusion import objective, sampler
from vqd_jax.models import conditioned
from vqd_jax.models.attention import ONE_DEVICE, Placement


class Generation(NamedTuple):
    """What ``VQDiffusion.generate`` returns.

    Attributes:
      images: P * J pictures; those of the first prompt come first.
      pixels: the same pictures, uint8 [P, J, S, S, 3].
      codes: int32 [P, J, N].
      trajectory: int32 [F, P, J, N], the tokens after every step (K is the mask token), if asked
        for.
      predictions: int32 [F, P, J, N], the likeliest clean codes at every step, likewise.
    """

    images: list[Image.Image]
    pixels: np.ndarray
    codes: np.ndarray
    trajectory: np.ndarray | None
    predictions: np.ndarray | None


class Likelihood(NamedTuple):
    """What ``VQDiffusion.likelihood`` returns: bounds on -log2 p(codes | prompt), float32 [P] each.

    Attributes:
      bits_per_token: of each of the N codes.
      bits_per_image: of all of them.
    """

    bits_per_token: np.ndarray
    bits_per_image: np.ndarray


@dataclasses.dataclass(frozen=True)
class Preview:
    """How far a batch of pictures is: what a callback of ``VQDiffusion.generate`` is given.

    Attributes:
      pictures: the numbers of these B pictures among the P * J of the call.
      step: network calls that are done for them.
      num_steps: those that it takes in all.
      progress: share of the whole call that is done, above 0 and up to 1.
      tokens: int32 [B, N]; K where a token is not decided.
      decided: bool [B, N], where a code stands. The rules "ordinary" and "remask", and the last
        step of "high_quality" and "purity", may still change one.
      codes: int32 [B, N], ``tokens`` with the likeliest code where none is decided.
      confidence: float32 [B, N], the probability of each of ``codes``, as the network saw it in the
        last step, after guidance, truncation and temperature.
      candidates: int32 [B, N, C], the five likeliest codes of every token, the best first.
      probabilities: float32 [B, N, C], theirs.
      decode: turns ``codes`` into pixels.
    """

    pictures: range
    step: int
    num_steps: int
    progress: float
    tokens: np.ndarray
    decided: np.ndarray
    codes: np.ndarray
    confidence: np.ndarray
    candidates: np.ndarray
    probabilities: np.ndarray
    decode: Callable[[np.ndarray], np.ndarray] = dataclasses.field(repr=False)

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """The pictures of ``codes``, uint8 [B, S, S, 3]; decoded when they are first asked for."""
        return self.decode(self.codes)

    @property
    def images(self) -> list[Image.Image]:
        """The pictures of ``codes``."""
        return [Image.fromarray(pixels) for pixels in self.pixels]


# What is given a preview after every segment; returning False cancels the call.
Callback = Callable[[Preview], Any]


class Cancelled(Exception):
    """A callback returned False, and the call that it watched has stopped."""


@jax.jit
def image_keys(seeds, pairs):
    """PRNG keys [B], of seeds, uint32 [B], and pairs (i, j), uint32 [B, 2]."""

    def fold(seed, pair):
        root = jax.random.fold_in(jax.random.key(seed), 2)
        return jax.random.fold_in(jax.random.fold_in(root, pair[0]), pair[1])

    return jax.vmap(fold)(seeds, pairs)


class _Given(NamedTuple):
    """What does not depend on the tokens, and is computed once, before the first step."""

    context: Any
    modulations: jax.Array


def _given(model, condition, null, settings, schedule) -> _Given:
    if settings.guidance is not None:
        condition = sampler.pairs(condition, jnp.broadcast_to(null, condition.shape))
    times = jnp.arange(1, schedule.num_steps + 1)
    return _Given(model.context(condition), model.denoiser.modulations(times))


def _predictor(model, given: _Given):
    """``predict_log_x0`` of ``sampler.sample``."""

    def predict_log_x0(tokens, time):
        # With a list of scales, some steps ask for the conditional rows alone.
        context, held = given.context, jax.tree.leaves(given.context)
        if held and held[0].shape[1] > tokens.shape[0]:
            context = jax.tree.map(lambda x: x[:, ::2], context)
        return model.denoiser.denoise(tokens, given.modulations[:, time - 1], context)

    return predict_log_x0


def _shape(model_config, keys) -> tuple[int, int]:
    grid = model_config.denoiser.grid
    return keys.shape[0], grid[0] * grid[1]


def draw(
    params,
    keys,
    condition,
    null,
    settings,
    *,
    model_config,
    schedule,
    placement: Placement = ONE_DEVICE,
) -> sampler.Sample:
    """One image for each key [B].

    Conditions are [B, ...]; the null condition of guidance is [B, ...] or, for all, [1, ...].
    """
    model = conditioned.bind(model_config, params, placement=placement)
    predict = _predictor(model, _given(model, condition, null, settings, schedule))
    return sampler.sample(keys, predict, _shape(model_config, keys), schedule, settings)


def begin(
    params,
    keys,
    condition,
    null,
    settings,
    *,
    model_config,
    schedule,
    placement: Placement = ONE_DEVICE,
) -> tuple[sampler.Chain, sampler.Steps, _Given]:
    """What ``advance`` begins with; arguments as for ``draw``."""
    model = conditioned.bind(model_config, params, placement=placement)
    shape = _shape(model_config, keys)
    given = _given(model, condition, null, settings, schedule)
    return *sampler.begin(keys, shape, schedule, settings), given


def advance(
    params,
    keys,
    chain,
    steps,
    given,
    settings,
    *,
    model_config,
    schedule,
    placement: Placement = ONE_DEVICE,
):
    """Some steps of ``draw``; see ``sampler.advance``."""
    model = conditioned.bind(model_config, params, placement=placement)
    predict = _predictor(model, given)
    return sampler.advance(keys, predict, chain, steps, schedule, settings)


def in_segments(
    begin: Callable,
    advance: Callable,
    inputs: tuple[Any, ...],
    settings: sampler.Settings,
    every: int,
    report: Callable[[int, int, np.ndarray, sampler.Answer], None],
) -> sampler.Sample:
    """What ``draw`` returns, made ``every`` steps at a time.

    Args:
      begin, advance: the functions above, compiled. One program of ``advance`` serves all segments,
        whatever the number of steps.
      inputs: params, keys, condition and null of ``draw``.
      settings: of ``draw``.
      every: steps of a segment.
      report: called after each with the steps done, all steps, the tokens [B, N], and the answer of
        the network. What it raises ends the call.
    """
    chain, steps, given = begin(*inputs, settings)
    steps = jax.tree.map(np.asarray, steps)
    changes = (steps.s < steps.t).any(axis=1)
    active, first = np.flatnonzero(changes), np.asarray(chain.tokens)
    # The steps say these already; left out, they do not ask for programs of their own.
    rest = settings.replace(num_steps=0, times=None, initial=None, calls_per_step=1)
    if np.ndim(settings.guidance):
        rest = rest.replace(guidance=np.zeros(1, np.float32))
    seen = []
    for done in range(0, len(active), every):
        part = active[done : done + every]
        at = jax.tree.map(lambda x, part=part: _filled(x[part], every), steps)
        chain, answer, stacked = advance(*inputs[:2], chain, at, given, rest)
        if stacked is not None:
            seen.append(jax.tree.map(lambda x, part=part: np.asarray(x)[: len(part)], stacked))
        tokens = np.asarray(chain.tokens)
        report(done + len(part), len(active), tokens, jax.tree.map(np.asarray, answer))
    if not seen:
        return sampler.Sample(tokens, None, None)
    trajectory, predictions = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    # Steps in which nothing changed have the tokens from before and the answer of the next call.
    calls = np.cumsum(changes)
    trajectory = np.concatenate([first[None], trajectory])[calls]
    following = np.minimum(calls - changes, len(active) - 1)
    return sampler.Sample(tokens, trajectory, predictions[following])


def tell(
    callback: Callback,
    numbers: range,
    count: int,
    num_codes: int,
    decode: Callable[[np.ndarray], np.ndarray],
    step: int,
    num_steps: int,
    tokens: np.ndarray,
    answer: sampler.Answer,
) -> None:
    """Gives a callback the ``Preview`` of a batch; the rows that fill it up are left out.

    Args:
      callback: see ``Callback``.
      numbers: of the pictures of the batch.
      count: pictures of the whole call.
      num_codes: K.
      decode: see ``Preview``.
      step, num_steps, tokens, answer: what ``in_segments`` reports.

    Raises:
      Cancelled: the callback returned False.
    """
    new = len(numbers)
    tokens, answer = tokens[:new], jax.tree.map(lambda x: x[:new], answer)
    decided = tokens < num_codes
    done = (numbers.start + new * step / num_steps) / count
    codes = np.where(decided, tokens, answer.candidates[..., 0])
    preview = Preview(
        numbers,
        step,
        num_steps,
        done,
        tokens,
        decided,
        codes,
        answer.confidence,
        answer.candidates,
        answer.probabilities,
        decode,
    )
    if callback(preview) is False:
        raise Cancelled(f"cancelled by its callback after step {step} of {num_steps}")


def _filled(x: np.ndarray, count: int) -> np.ndarray:
    """``x`` [n, ...] with zeros up to [count, ...]: steps from 0 to 0, in which nothing changes."""
    return np.pad(x, [(0, count - len(x)), *[(0, 0)] * (x.ndim - 1)])


def bits(
    params,
    key,
    codes,
    condition,
    *,
    model_config,
    schedule,
    num_draws: int,
    placement: Placement = ONE_DEVICE,
) -> jax.Array:
    """Bound on -log2 p(codes | condition), bits a token, float32 [B]; see ``objective.likelihood``.

    All pictures meet the same noise.
    """
    model = conditioned.bind(model_config, params, placement=placement)
    predict = model.predictor(condition)
    return objective.likelihood(key, predict, codes, schedule, num_draws, shared_noise=True)


def text_features(params, ids, *, config, placement: Placement = ONE_DEVICE):
    """Features float32 [B, L, D] of ids int32 [B, L]."""
    model = conditioned.bind(config, params, placement=placement)
    return model.text_features(ids).astype(jnp.float32)


def log_p0(params, codes, condition, time, *, config, placement: Placement = ONE_DEVICE):
    """log p0 float32 [B, N, K] of tokens [B, N] at times [B]; features, labels or no condition."""
    denoiser = conditioned.bind(config, params, placement=placement).denoiser
    return jax.nn.log_softmax(denoiser(codes, time, condition))
