"""Exact draws from categorical distributions, with few random bits.

A draw is a race between exponential clocks. The clock of category i rings at E_i / p_i with
E_i ~ Exp(1), and it is the first to ring with probability p_i / sum_j p_j. (Gumbel-max is the same
race on a logarithmic scale.) An exponential is made of 64 random bits, so that even a category 40
nats below the best is drawn with its own probability. JAX's default Gumbel noise ends near 16 nats.

A race between K codes needs 2 K random words for every token, which costs more than all else in a
sampling step. The codes are therefore divided into about sqrt(K) blocks of sqrt(K) codes. One race
chooses the block and a second one the code in it. Together they need 4 sqrt(K) words, and the
distribution is the same.

Letters: K number of codes.
"""

import math

import jax
import jax.numpy as jnp


def exponential(words: jax.Array) -> jax.Array:
    """Exp(1) variables float32 [...] from random words uint32 [..., 2]; smallest 2^-65."""
    high, low = words[..., 0].astype(jnp.float32), words[..., 1].astype(jnp.float32)
    uniform = (high + (low + 0.5) * 2.0**-32) * 2.0**-32
    # Rounding must not make it 1: that clock would never ring, however likely its category.
    return -jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24))


def race(words: jax.Array, p: jax.Array) -> jax.Array:
    """Index int32 [] drawn with probability p_i / sum p; words uint32 [n, 2], p float32 [n]."""
    possible = p > 0
    ring = jnp.where(possible, exponential(words) / jnp.where(possible, p, 1.0), jnp.inf)
    return jnp.argmin(ring).astype(jnp.int32)


def block_shape(num_codes: int) -> tuple[int, int]:
    """(number of blocks, codes in each) that ``code`` draws from."""
    width = math.isqrt(num_codes - 1) + 1
    return -(-num_codes // width), width


def num_words(num_codes: int) -> int:
    """Random words that ``code`` needs."""
    return 2 * sum(block_shape(num_codes))


def code(words: jax.Array, log_p: jax.Array) -> jax.Array:
    """A code int32 [] drawn from exp log_p.

    Args:
      words: uint32 [num_words(K)].
      log_p: float32 [K], normalised; log-probabilities below -87 are never drawn.
    """
    num_codes = log_p.shape[0]
    blocks, width = block_shape(num_codes)
    pairs = words.reshape(blocks + width, 2)
    padded = jnp.pad(jnp.exp(log_p), (0, blocks * width - num_codes))
    block = race(pairs[:blocks], padded.reshape(blocks, width).sum(axis=1))
    index = block * width + jnp.arange(width)
    p = jnp.where(index < num_codes, jnp.exp(log_p[jnp.minimum(index, num_codes - 1)]), 0.0)
    return block * width + race(pairs[blocks:], p)


def any_code(word: jax.Array, num_codes: int) -> jax.Array:
    """A code int32 [] from one random word uint32 []; uniform to K / 2^32 of itself."""
    return (word % jnp.uint32(num_codes)).astype(jnp.int32)


def gumbel(words: jax.Array) -> jax.Array:
    """Standard Gumbel variables float32 [...] from random words uint32 [..., 2]."""
    return -jnp.log(exponential(words))
