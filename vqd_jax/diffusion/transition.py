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

It is the sum over x_0 of p0(x_0) q(x_s | x_t, x_0): O(K) a token, no matrix, and nothing is a
difference of nearly equal numbers. At s = 0 it is p0 itself. Where the schedule never replaces
(B = 0), a visible token is certain and stays.

Letters: K number of codes (the id of the mask token), A keep, B replace, C mask, V = 1 - C.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from vqd_jax.diffusion.schedule import Schedule

# Log-probability that stands for "impossible"; finite, so that it can meet a gradient.
LOG_ZERO = -1e30


class Bridge(NamedTuple):
    """The ratios of two times s < t that the posterior is made of; float32, any shape.

    Attributes:
      stay_masked: m = C_s / C_t, and its complement.
      stay_replaced: r = (B_s / A_s) / (B_t / A_t), and its complement.
      clean: g = A_s / V_s, and its complement.
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
    at = lambda time: tuple(  # noqa: E731
        jnp.asarray(table)[time] for table in (schedule.keep, schedule.replace, schedule.mask)
    )
    (keep_s, replace_s, mask_s), (keep_t, replace_t, mask_t) = at(s), at(t)
    visible_s = keep_s + schedule.num_codes * replace_s
    # Cross-multiplied so that keep_t = 0 (nothing survives) needs no special case.
    replaced_by_s, replaced_by_t = replace_s * keep_t, replace_t * keep_s
    has_mask, has_replace = mask_t > 0, replaced_by_t > 0
    over = lambda a, b, ok, other: jnp.where(ok, a / jnp.where(ok, b, 1.0), other)  # noqa: E731
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
    log_noise = jnp.where(masked, 0.0, safe_log(noise_share(log_px, b)))
    log_jump = safe_log(jnp.where(masked, b.unmask, b.unreplace))
    log_uniform = safe_log(b.uniform / num_codes) + log_noise
    codes = log_jump + jnp.logaddexp(safe_log(b.clean) + log_x0, log_uniform)
    codes = jnp.where((jnp.arange(num_codes) == x) & ~masked, log_stay(log_px, b, num_codes), codes)
    return jnp.append(codes, jnp.where(masked, safe_log(b.stay_masked), LOG_ZERO))


def noise_share(log_px: jax.Array, b: Bridge) -> jax.Array:
    """1 - k p0_x: probability that a token showing the code x shows it by replacement."""
    return -jnp.expm1(log_px) + b.noise_at_t * jnp.exp(log_px)


def log_stay(log_px: jax.Array, b: Bridge, num_codes: int) -> jax.Array:
    """log p(x_s = x | x_t = x) of a visible token; any shape."""
    px, noise = jnp.exp(log_px), noise_share(log_px, b)
    kept = (1 - b.noise_at_t) * px
    redrawn = b.clean * b.noise_at_t * px + b.uniform / num_codes * noise
    return safe_log(kept + b.stay_replaced * noise + b.unreplace * redrawn)


def q_sample(key: jax.Array, x0: jax.Array, t: jax.Array, schedule: Schedule) -> jax.Array:
    """Draws x_t ~ q(x_t | x_0) of one token: int32 []. Exact: one uniform, one random code."""
    key_branch, key_code = jax.random.split(key)
    u = jax.random.uniform(key_branch)
    code = jax.random.randint(key_code, (), 0, schedule.num_codes)
    mask, keep = jnp.asarray(schedule.mask)[t], jnp.asarray(schedule.keep)[t]
    return jnp.where(u < mask, schedule.num_codes, jnp.where(u < mask + keep, x0, code))


def draw_posterior(
    key: jax.Array,
    log_x0: jax.Array,
    x_t: jax.Array,
    s: jax.Array,
    t: jax.Array,
    schedule: Schedule,
) -> jax.Array:
    """Draws x_s ~ p(x_s | x_t) of one token: int32 [].

    The posterior is a mixture (stay as it is, take a code from p0, take any code), so the branch is
    drawn first; then the code. ``log_x0`` is float32 [K], normalised.
    """
    chex.assert_shape(log_x0, (schedule.num_codes,))
    key_branch, key_clean, key_uniform = jax.random.split(key, 3)
    b = bridge(s, t, schedule)
    masked = x_t == schedule.num_codes
    jump = jnp.where(masked, b.unmask, b.unreplace)
    noise = jnp.where(masked, 1.0, noise_share(log_x0[jnp.where(masked, 0, x_t)], b))
    from_clean, from_uniform = jump * b.clean, jump * b.uniform * noise
    u = jax.random.uniform(key_branch)
    # JAX's default Gumbel noise has too little resolution for codes 16 nats below the best.
    clean = jax.random.categorical(key_clean, log_x0, mode="high")
    uniform = jax.random.randint(key_uniform, (), 0, schedule.num_codes)
    return jnp.where(u < from_clean, clean, jnp.where(u < from_clean + from_uniform, uniform, x_t))
