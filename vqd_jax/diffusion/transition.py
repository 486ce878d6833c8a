"""Forward process and posterior of mask-and-replace diffusion, closed form, in log space.

Every kernel is written for one token and lifted with ``jax.vmap``; a categorical distribution over
the K codes and the mask token (id K) is a vector of K+1 log-probabilities. The posterior of any
time s < t, given the code distribution p0 that the network predicts, is (A, B, C are keep, replace
and mask; V = 1 - C is the visible mass)

  x_t masked:      p(mask)  = m
                   p(j)     = (1 - m) (g p0_j + (1 - g) / K)
  x_t a code x:    p(j)     = (1 - r) (g p0_j + (1 - g) / K (1 - k p0_x))                   j != x
                   p(x)     = the same with p0_x (1 - k) in place of p0_x,
                              + k p0_x + r (1 - k p0_x)

  m = C_s / C_t                          masked at t: was it masked at s already?
  r = (B_s / A_s) / (B_t / A_t)          replaced at t: had it been replaced by s already?
  g = A_s / V_s                          visible at s: is it the clean code (and not noise)?
  k = A_t / (A_t + B_t)                  shows the code x: is x the clean code, were p0_x 1?

It is the sum over x_0 of p0(x_0) q(x_s | x_t, x_0): O(K) a token, and no matrix. The only
differences of nearly equal numbers are 1 - m and 1 - r of a short step, where their rounding is
harmless. At s = 0 the posterior is p0 itself, unless the schedule never replaces (B = 0): then a
visible token is certain and stays.

Letters: K number of codes (the id of the mask token), A keep, B replace, C mask, V = 1 - C.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from vqd_jax.diffusion import draws
from vqd_jax.diffusion.schedule import Schedule

# Log-probability that stands for "impossible"; finite, so that it can meet a gradient.
LOG_ZERO = -1e30


class Bridge(NamedTuple):
    """The ratios of two times s < t that the posterior is made of; float32, any shape.

    Attributes:
      stay_masked: m = C_s / C_t.
      unmask: 1 - m.
      stay_replaced: r = (B_s / A_s) / (B_t / A_t).
      unreplace: 1 - r.
      clean: g = A_s / V_s.
      uniform: 1 - g.
      noise_at_t: 1 - k = B_t / (A_t + B_t).
    """

    stay_masked: jax.Array
    unmask: jax.Array
    stay_replaced: jax.Array
    unreplace: jax.Array
    clean: jax.Array
    uniform: jax.Array
    noise_at_t: jax.Array


def bridge(s: jax.Array, t: jax.Array, schedule: Schedule) -> Bridge:
    """The ratios of the times s < t (integers, any shape, traced or not)."""
    tables = [jnp.asarray(x) for x in (schedule.keep, schedule.replace, schedule.mask)]
    keep_s, replace_s, mask_s = (table[s] for table in tables)
    keep_t, replace_t, mask_t = (table[t] for table in tables)
    visible_s = keep_s + schedule.num_codes * replace_s
    # Cross-multiplied so that keep_t = 0 (nothing survives) needs no special case.
    replaced_by_s, replaced_by_t = replace_s * keep_t, replace_t * keep_s
    has_mask, has_replace = mask_t > 0, replaced_by_t > 0

    def over(a, b, ok, other):
        return jnp.where(ok, a / jnp.where(ok, b, 1.0), other)

    return Bridge(
        stay_masked=over(mask_s, mask_t, has_mask, 0.0),
        unmask=over(mask_t - mask_s, mask_t, has_mask, 1.0),
        stay_replaced=over(replaced_by_s, replaced_by_t, has_replace, 1.0),
        unreplace=over(replaced_by_t - replaced_by_s, replaced_by_t, has_replace, 0.0),
        clean=over(keep_s, visible_s, visible_s > 0, 0.0),
        uniform=over(schedule.num_codes * replace_s, visible_s, visible_s > 0, 1.0),
        noise_at_t=over(replace_t, keep_t + replace_t, keep_t + replace_t > 0, 1.0),
    )


def safe_log(x: jax.Array) -> jax.Array:
    """log x, LOG_ZERO where x <= 0, with gradient 0 there (the double-where idiom)."""
    positive = x > 0
    return jnp.where(positive, jnp.log(jnp.where(positive, x, 1.0)), LOG_ZERO)


def marginal(log_x0: jax.Array, t: jax.Array, schedule: Schedule) -> jax.Array:
    """log q(x_t | x_0 ~ exp log_x0) of one token.

    Args:
      log_x0: float32 [K], log-probabilities of the clean code.
      t: int32 [], time in 0..T.

    Returns:
      float32 [K+1]: A_t p0_j + B_t for the codes, C_t for the mask token.
    """
    chex.assert_shape(log_x0, (schedule.num_codes,))
    keep, replace, mask = (
        safe_log(jnp.asarray(table)[t])
        for table in (schedule.keep, schedule.replace, schedule.mask)
    )
    return jnp.append(jnp.logaddexp(keep + log_x0, replace), mask)


def posterior(
    log_x0: jax.Array, x_t: jax.Array, s: jax.Array, t: jax.Array, schedule: Schedule
) -> jax.Array:
    """log p(x_s | x_t) of one token under the predicted code distribution exp log_x0.

    Args:
      log_x0: float32 [K], normalised log-probabilities of the clean code.
      x_t: int32 [], the token at time t; K is the mask token.
      s, t: int32 [], times with 0 <= s < t <= T.

    Returns:
      float32 [K+1], normalised.
    """
    chex.assert_shape(log_x0, (schedule.num_codes,))
    b = bridge(s, t, schedule)
    num_codes = schedule.num_codes
    masked = x_t == num_codes
    x = jnp.where(masked, 0, x_t)
    log_px = log_x0[x]
    log_noise = jnp.where(masked, 0.0, safe_log(noise_share(log_px, b.noise_at_t)))
    log_jump = safe_log(jnp.where(masked, b.unmask, b.unreplace))
    log_uniform = safe_log(b.uniform / num_codes) + log_noise
    codes = log_jump + jnp.logaddexp(safe_log(b.clean) + log_x0, log_uniform)
    codes = jnp.where((jnp.arange(num_codes) == x) & ~masked, log_stay(log_px, b, num_codes), codes)
    return jnp.append(codes, jnp.where(masked, safe_log(b.stay_masked), LOG_ZERO))


def noise_share(log_px: jax.Array, noise_at_t: jax.Array) -> jax.Array:
    """1 - k p0_x of 1 - k: probability that a token showing the code x does so by replacement."""
    return noise_at_t * jnp.exp(log_px) - jnp.expm1(log_px)


def log_stay(log_px: jax.Array, b: Bridge, num_codes: int) -> jax.Array:
    """log p(x_s = x | x_t = x) of a visible token; any shape."""
    px, noise = jnp.exp(log_px), noise_share(log_px, b.noise_at_t)
    kept = (1 - b.noise_at_t) * px
    redrawn = b.clean * b.noise_at_t * px + b.uniform / num_codes * noise
    return safe_log(kept + b.stay_replaced * noise + b.unreplace * redrawn)


def q_sample(key: jax.Array, x0: jax.Array, t: jax.Array, schedule: Schedule) -> jax.Array:
    """Draws x_t ~ q(x_t | x_0) of one token: int32 []; x0 int32 [] in 0..K-1, t in 0..T.

    The marginal is a mixture (still there, any code, masked): the branch is drawn first.
    """
    words = jax.random.bits(key, (7,))
    keep, replace, mask = (
        jnp.asarray(table)[t] for table in (schedule.keep, schedule.replace, schedule.mask)
    )
    shares = jnp.stack([keep, schedule.num_codes * replace, mask])
    branch = draws.race(words[:6].reshape(3, 2), shares)
    code = draws.any_code(words[6], schedule.num_codes)
    return jnp.stack([jnp.asarray(x0, jnp.int32), code, jnp.int32(schedule.num_codes)])[branch]


def draw_prior(key: jax.Array, schedule: Schedule) -> jax.Array:
    """Draws x_T of one token that nothing is known of: int32 [].

    Masked with probability C_T, else any code. A chain begins from this law p(x_T).
    """
    words = jax.random.bits(key, (5,))
    mask = jnp.asarray(schedule.mask)[-1]
    branch = draws.race(words[:4].reshape(2, 2), jnp.stack([1 - mask, mask]))
    code = draws.any_code(words[4], schedule.num_codes)
    return jnp.stack([code, jnp.int32(schedule.num_codes)])[branch]


def draw_posterior(
    key: jax.Array,
    log_x0: jax.Array,
    x_t: jax.Array,
    s: jax.Array,
    t: jax.Array,
    schedule: Schedule,
) -> jax.Array:
    """Draws x_s ~ p(x_s | x_t) of one token: int32 []; arguments as in ``posterior``."""
    chex.assert_shape(log_x0, (schedule.num_codes,))
    return draw_across(key, log_x0, x_t, bridge(s, t, schedule))


def draw_across(key: jax.Array, log_x0: jax.Array, x_t: jax.Array, b: Bridge) -> jax.Array:
    """Draws x_s of one token across a bridge; log_x0 float32 [K], normalised.

    The posterior is a mixture: take a code from p0, take any code, or stay as it is. Its shares are

      jump g,  jump (1 - g) (1 - k p0_x),  and the rest,   jump = 1 - m (masked) or 1 - r (visible)

    so the branch is drawn first, and then a code: O(sqrt K) random words, and no bias in the tail.
    """
    num_codes = log_x0.shape[0]
    masked = x_t == num_codes
    log_px = log_x0[jnp.where(masked, 0, x_t)]
    noise = jnp.where(masked, 1.0, noise_share(log_px, b.noise_at_t))
    jump = jnp.where(masked, b.unmask, b.unreplace)
    # The rest of a visible token, r (1 - k p0_x) + k p0_x (1 - jump g), as a sum of positive terms.
    kept = (1 - b.noise_at_t) * jnp.exp(log_px) * (b.stay_replaced + b.unreplace * b.uniform)
    rest = jnp.where(masked, b.stay_masked, b.stay_replaced * noise + kept)
    words = jax.random.bits(key, (7 + draws.num_words(num_codes),))
    shares = jnp.stack([jump * b.clean, jump * b.uniform * noise, rest])
    branch = draws.race(words[:6].reshape(3, 2), shares)
    codes = draws.code(words[7:], log_x0), draws.any_code(words[6], num_codes)
    return jnp.stack([*codes, jnp.asarray(x_t, jnp.int32)])[branch]
