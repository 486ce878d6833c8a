"""Step rules of the reverse process: how the tokens at time t become those at time s < t.

A rule is called for one image as ``rule(key, log_x0, tokens, step, schedule)`` and returns the
tokens at time s; ``sampler.sample`` lifts it over the batch and runs it in one scan. ``Ancestral``
is the reverse process itself, for any s < t. ``PublishedFast`` is the published shortcut, kept for
comparison. ``Flow`` leaves noise as it is until it ends, and ``Remask`` hides some tokens again.
The others reveal masked tokens, a given number in every step. They differ in the choice: at random
(``HighQuality``), where the network is sure (``Purity``, ``Confidence``, ``Moment``), or far apart
from each other (``Halton``).

The attribute ``start`` of a rule says how its chains begin unless the settings say otherwise: from
the law of the schedule at time T ("schedule"), or with every token masked ("masked").

Letters: N image tokens, K codes, T steps of the schedule, C mask probability, V = 1 - C.
"""

import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from vqd_jax.diffusion import chunks, draws, transition
from vqd_jax.diffusion.schedule import Schedule


class Step(NamedTuple):
    """Where one image is: int32 [] each.

    Attributes:
      s, t: the step goes from time t to time s <= t; s = t changes nothing.
      start: the time at which this image began.
      num_masked: how many of its tokens were masked then.
      masked_share: float32 [], the probability that a token to be found was masked then.
      part: float32 [], how much of the step is done after this call of the network; 1 where every
        step is one call.
    """

    s: jax.Array
    t: jax.Array
    start: jax.Array
    num_masked: jax.Array
    masked_share: jax.Array | float = 1.0
    part: jax.Array | float = 1.0

    @property
    def is_last(self) -> jax.Array:
        """bool []: after this call no token is masked."""
        return (self.s == 0) & (self.part == 1)


class Ancestral(struct.PyTreeNode):
    """x_s ~ p(x_s | x_t) of every token; exact for any s < t (VQ-Diffusion, equation 11)."""

    start: ClassVar[str] = "schedule"

    def __call__(self, key, log_x0, tokens, step: Step, schedule: Schedule) -> jax.Array:
        return _draw(key, log_x0, tokens, transition.bridge(step.s, step.t, schedule))


class PublishedFast(struct.PyTreeNode):
    """The published "fast inference": one step's worth of unmasking, ``skip`` times too late.

    p0 is predicted at t. The posterior, however, is that of the single step that ends at
    t - skip - 1 (at t <= skip + 1: at t - 1), as if x_t were the tokens at time t - skip. Fewer
    tokens are revealed than the schedule says, and the last calls reveal the rest at once. Use it
    with ``sampler.published_fast``.

    Attributes:
      skip: times left out between two calls.
    """

    start: ClassVar[str] = "masked"
    skip: int

    def __call__(self, key, log_x0, tokens, step: Step, schedule: Schedule) -> jax.Array:
        t = self.posterior_time(step.t)
        return _draw(key, log_x0, tokens, transition.bridge(t - 1, t, schedule))

    def posterior_time(self, t: jax.Array) -> jax.Array:
        """The time whose single step a call at time t takes."""
        return jnp.where(t - 1 > self.skip, t - self.skip, t)


class Remask(struct.PyTreeNode):
    """Hides a share of the visible tokens again, to correct them (ReMDM, arXiv:2503.00307).

    The share is ``strength`` times the largest one that keeps the marginals of every time. Equally
    many more tokens are revealed. With strength 0 it is ``Ancestral``.

    Attributes:
      strength: 0..1 ("rescale" in the paper).
    """

    start: ClassVar[str] = "schedule"
    strength: float = 0.05

    def __call__(self, key, log_x0, tokens, step: Step, schedule: Schedule) -> jax.Array:
        key_hide, key_draw = jax.random.split(key)
        mask = jnp.asarray(schedule.mask)[step.start]
        scale = step.masked_share / jnp.where(mask > 0, mask, 1.0)
        hide, b = remasking_bridge(step.s, step.t, self.strength, schedule, scale)
        drawn = _draw(key_draw, log_x0, tokens, b)
        hidden = (tokens < schedule.num_codes) & jax.random.bernoulli(key_hide, hide, tokens.shape)
        return jnp.where(hidden, schedule.num_codes, drawn)


def remasking_bridge(
    s: jax.Array,
    t: jax.Array,
    strength: jax.Array,
    schedule: Schedule,
    scale: jax.Array | float = 1.0,
) -> tuple[jax.Array, transition.Bridge]:
    """Share h of visible tokens to hide from t to s, and the bridge that makes up for it.

      h = strength * min(1, M_s / (1 - M_t))      p(stay masked) = (M_s - h (1 - M_t)) / M_t

    so that the masked share at s is M_t p(stay masked) + (1 - M_t) h = M_s, as without hiding.
    M is the masked share of the chain's own tokens, M_t = ``scale`` C_t. The scale is 1 unless
    a chain began with another share of masks than C, as where all are masked or some are known.
    """
    mask_s, mask_t = (scale * jnp.asarray(schedule.mask)[time] for time in (s, t))
    visible_t = jnp.maximum(1 - mask_t, 1e-12)
    hide = jnp.where(s < t, strength * jnp.minimum(1.0, mask_s / visible_t), 0.0)
    b = transition.bridge(s, t, schedule)
    more = hide * visible_t / jnp.where(mask_t > 0, mask_t, 1.0)
    stay = jnp.maximum(b.stay_masked - more, 0.0)
    return hide, b._replace(stay_masked=stay, unmask=1 - stay)


class Flow(struct.PyTreeNode):
    """Draws a token from p0 when its noise ends, and leaves it until then (arXiv:2407.15595).

    A token that is noise at t is clean at s with the probability (A_s - A_t) / (1 - A_t), where A
    is the keep probability. ``Ancestral`` gives a token other noise on its way. Here a chain keeps
    what it began with until it is drawn, so that the picture depends on the first tokens; a student
    of ``training/distil.py`` has learnt to rely on them. If masks and replacements grow in
    proportion, as in every schedule of configs, the law of a token is that of the schedule at every
    time.
    """

    start: ClassVar[str] = "schedule"

    def __call__(self, key, log_x0, tokens, step: Step, schedule: Schedule) -> jax.Array:
        key_clean, key_draw = jax.random.split(key)
        keep = jnp.asarray(schedule.keep)
        share = (keep[step.s] - keep[step.t]) / (1 - keep[step.t])
        clean = jax.random.bernoulli(key_clean, share, tokens.shape)
        return jnp.where(clean, _draw_codes(key_draw, log_x0), tokens)


class Reveal(struct.PyTreeNode):
    """Reveals a given number of masked tokens in every step; the base of five rules.

    A revealed token stays as it is. A subclass says which tokens come first (``priority``) and may
    sharpen the distribution that their codes are drawn from (``sharpened``).

    Attributes:
      redraws_last: the last step draws every token anew from p0, as the published sampler does.
      is_random: the order is drawn, so the key is split between codes and order.
    """

    # Visible tokens are never changed, so one that began as noise would stay.
    start: ClassVar[str] = "masked"
    redraws_last: ClassVar[bool] = False
    is_random: ClassVar[bool] = True

    def __call__(self, key, log_x0, tokens, step: Step, schedule: Schedule) -> jax.Array:
        key_codes, key_order = jax.random.split(key) if self.is_random else (key, None)
        codes = _draw_codes(key_codes, self.sharpened(log_x0, step))
        priority = self.priority(key_order, log_x0, codes, step)
        shown = reveal(tokens, codes, priority, step, schedule)
        return jnp.where(step.is_last, codes, shown) if self.redraws_last else shown

    def sharpened(self, log_x0: jax.Array, step: Step) -> jax.Array:
        """Log-probabilities float32 [N, K] that the codes are drawn from."""
        del step
        return log_x0

    def priority(self, key, log_x0: jax.Array, codes: jax.Array, step: Step) -> jax.Array:
        """float32 [N]; masked tokens of the highest priority are revealed first."""
        raise NotImplementedError


class HighQuality(Reveal):
    """Reveals tokens at random positions (Improved VQ-Diffusion, section 3.2)."""

    redraws_last: ClassVar[bool] = True

    def priority(self, key, log_x0, codes, step):
        return _gumbel(key, codes.shape)


class Purity(Reveal):
    """As ``HighQuality``, but likelier where p0 is sharp (Improved VQ-Diffusion, equation 11).

    Attributes:
      weight: r; codes are drawn from softmax((1 + r purity) log p0), the last step's from p0.
    """

    redraws_last: ClassVar[bool] = True
    weight: float = 0.0

    def sharpened(self, log_x0, step):
        return sharpen(log_x0, jnp.where(step.is_last, 0.0, self.weight) * purity(log_x0))

    def priority(self, key, log_x0, codes, step):
        # Adding Gumbel noise to log weights and taking the best draws without replacement.
        return transition.safe_log(purity(log_x0)) + _gumbel(key, codes.shape)


def purity(log_x0: jax.Array) -> jax.Array:
    """max_k p0 of every token over the largest of the image: float32 [N] from [N, K]."""
    top = jnp.exp(log_x0.max(axis=-1))
    return top / (top.max() + 1e-10)


def sharpen(log_x0: jax.Array, amount: jax.Array) -> jax.Array:
    """softmax((1 + amount) log p0), in logs: float32 [N, K] from [N, K] and amount [N]."""
    return jax.nn.log_softmax((1 + amount)[:, None] * log_x0)


class Confidence(Reveal):
    """Reveals where the drawn code is likeliest (MaskGIT, arXiv:2202.04200, section 3.2).

    Attributes:
      temperature: of the Gumbel noise on log p0[code]; it is multiplied by the share of time left.
    """

    temperature: float = 4.5

    def priority(self, key, log_x0, codes, step):
        noise = self.temperature * step.s / step.start * _gumbel(key, codes.shape)
        return jnp.take_along_axis(log_x0, codes[:, None], axis=-1)[:, 0] + noise


class Moment(Reveal):
    """Chooses positions first and draws their codes then (arXiv:2510.04525, section 3).

    ``Confidence`` draws codes everywhere and keeps those that came out likely. Where few of many
    tokens are revealed, that is to choose position i with a probability proportional to

      sum_k p0_ik^b      and then its code with p ~ p0_i^b,      b = 1 + 1 / temperature,

    which this rule does; the temperature is multiplied by the share of time left. The step that
    reveals the rest has nothing to choose and draws from p0. At an infinite temperature every
    position is equally likely and its code is from p0: no drawn code has a say in the choice.

    Attributes:
      temperature: as of ``Confidence``.
    """

    temperature: float = 4.5

    def sharpened(self, log_x0, step):
        return jax.nn.log_softmax(self.power(step) * log_x0)

    def priority(self, key, log_x0, codes, step):
        # Adding Gumbel noise to log weights and taking the best draws without replacement.
        weights = jax.nn.logsumexp(self.power(step) * log_x0, axis=-1)
        return weights + _gumbel(key, codes.shape)

    def power(self, step: Step) -> jax.Array:
        """b, float32 []."""
        # Several calls may share the step to time 0; none of them is at temperature 0.
        temperature = self.temperature * jnp.maximum(step.s, 1) / step.start
        return jnp.where(step.is_last, 1.0, 1 + 1 / jnp.maximum(temperature, 1e-2))


class Halton(Reveal):
    """Reveals positions in the order of a Halton sequence, far apart from each other
    (arXiv:2503.17076).

    Attributes:
      grid: rows and columns, N = rows * columns.
    """

    is_random: ClassVar[bool] = False
    grid: tuple[int, int] = struct.field(pytree_node=False)

    def priority(self, key, log_x0, codes, step):
        return -jnp.asarray(halton_rank(*self.grid), jnp.float32)


@functools.cache
def halton_rank(rows: int, columns: int) -> np.ndarray:
    """int32 [N]: when the Halton sequence (bases 2 and 3) first meets the cell of every token."""
    # Its import takes half a second, which the other rules need not wait for.
    from scipy.stats import qmc

    cells, rank = rows * columns, {}
    points = qmc.Halton(2, scramble=False).fast_forward(1)
    while len(rank) < cells:
        for down, right in points.random(cells):
            rank.setdefault(int(down * rows) * columns + int(right * columns), len(rank))
    return np.array([rank[cell] for cell in range(cells)], np.int32)


def num_to_reveal(tokens: jax.Array, step: Step, schedule: Schedule) -> jax.Array:
    """How many masked tokens [] a call reveals; num_masked C_s / C_start of them stay masked.

    Where several calls share a step, C falls evenly from C_t to C_s.

    The steps of a chain sum to ``num_masked`` for any N and any list of times.
    """
    mask = jnp.asarray(schedule.mask)
    now = step.part * mask[step.s] + (1 - step.part) * mask[step.t]
    share = now / jnp.where(mask[step.start] > 0, mask[step.start], 1.0)
    stay = jnp.round(step.num_masked * share).astype(jnp.int32)
    return jnp.maximum(jnp.sum(tokens == schedule.num_codes) - stay, 0)


def reveal(
    tokens: jax.Array, codes: jax.Array, priority: jax.Array, step: Step, schedule: Schedule
) -> jax.Array:
    """Tokens [N] with the masked ones of highest ``priority`` [N] replaced by ``codes`` [N]."""
    masked = tokens == schedule.num_codes
    priority = jnp.where(masked, priority, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-priority))
    return jnp.where(masked & (rank < num_to_reveal(tokens, step, schedule)), codes, tokens)


def _draw(key, log_x0, tokens, b: transition.Bridge):
    """x_s [N] of one image."""
    keys = jax.random.split(key, tokens.shape)
    draw = jax.vmap(transition.draw_across, in_axes=(0, 0, 0, None))
    return chunks.over_tokens(lambda *x: draw(*x, b), keys, log_x0, tokens, axis=0)


def _draw_codes(key, log_x0):
    """A code [N] for every token of one image, from p0."""
    words = jax.random.bits(key, (log_x0.shape[0], draws.num_words(log_x0.shape[1])))
    return chunks.over_tokens(jax.vmap(draws.code), words, log_x0, axis=0)


def _gumbel(key, shape):
    return draws.gumbel(jax.random.bits(key, (*shape, 2)))
