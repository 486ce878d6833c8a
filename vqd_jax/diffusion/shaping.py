"""What happens to the network's answer before a step draws from it: guidance, temperature, top-k,
truncation.

Letters: B batch, N image tokens, K codes, S sampling steps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vqd_jax.diffusion import chunks, transition


def ramp(scale: float, num_steps: int) -> np.ndarray:
    """Guidance that rises evenly from 1 to ``scale``: float32 [S] (arXiv:2507.08965)."""
    return np.linspace(1.0, scale, num_steps, dtype=np.float32)


def interval(scale: float, num_steps: int, first: float, last: float) -> np.ndarray:
    """``scale`` from the share ``first`` of the steps to ``last``, else 1 (no null pass there)."""
    progress = (np.arange(num_steps) + 0.5) / num_steps
    return np.where((first <= progress) & (progress < last), scale, 1.0).astype(np.float32)


def guide(log_cond: jax.Array, log_null: jax.Array, scale: jax.Array) -> jax.Array:
    """Classifier-free guidance of code distributions (Improved VQ-Diffusion, equation 7).

    Args:
      log_cond, log_null: float32 [..., K], with and without the condition; log p0 or logits.
      scale: 1 gives log_cond back, 0 log_null.

    Returns:
      float32 [..., K], normalised.
    """
    return jax.nn.log_softmax(_guided_logits(log_cond, log_null, scale))


def _guided_logits(log_cond, log_null, scale):
    return log_null + scale * (log_cond - log_null)


def truncate(log_x0: jax.Array, rate: jax.Array) -> jax.Array:
    """Keeps a code iff the codes ranked above it hold less than ``rate``; float32 [..., K].

    The most likely code always stays, and so does the one that crosses the rate. The others become
    impossible.

    Args:
      log_x0: float32 [..., K], normalised.
      rate: in (0, 1] (Improved VQ-Diffusion, section 3.1).

    Returns:
      float32 [..., K], normalised.
    """
    p = jnp.exp(log_x0)
    # The last code that stays and all below it hold at least 1 - rate, so it holds a K-th of that.
    lowest = jnp.log((1 - rate) / p.shape[-1]) - 1.0

    def above(threshold):
        # The probabilities are added, too. Comparing log p would read a second array.
        return p > jnp.exp(threshold)

    return _keep(log_x0, lowest, above, p, rate)


def keep_top_k(log_x0: jax.Array, k: jax.Array) -> jax.Array:
    """Keeps the k >= 1 most likely codes and what ties with them; float32 [..., K], normalised."""
    return _keep(log_x0, -jnp.inf, lambda threshold: log_x0 > threshold, 1.0, k)


def _keep(log_x0, lowest, above, weight, amount):
    """Keeps a code iff the codes strictly above it weigh less than ``amount``."""

    def too_low(threshold):
        return jnp.where(above(threshold), weight, 0.0).sum(-1, keepdims=True) >= amount

    top = log_x0.max(-1, keepdims=True)
    # Nothing is drawn 60 nats below the best code.
    low = bisect(too_low, jnp.maximum(lowest, top - 60.0), top)
    # The best code stays even if rounding puts it below the threshold.
    return jax.nn.log_softmax(jnp.where(above(low) | (log_x0 >= top), log_x0, transition.LOG_ZERO))


def bisect(too_low: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """The greatest threshold that is too low, found without sorting what it is a threshold of.

    Args:
      too_low: thresholds -> bool, of the same shape; true up to some threshold and false above.
      low, high: where to look. Of 60 nats, 32 halvings leave less than float32 tells apart.
    """

    def narrow(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        found = too_low(middle)
        return jnp.where(found, middle, low), jnp.where(found, high, middle)

    return jax.lax.fori_loop(0, 32, narrow, (low, high))[0]


def shape_x0(answers: jax.Array, settings, scale: jax.Array | None = None) -> jax.Array:
    """The network's answers after guidance, temperature, top-k and truncation, in this order.

    Args:
      answers: log p0 or logits of it: [B, N, K]. With guidance [2B, N, K], where the even rows were
        answered with the condition and the odd ones without (``sampler.pairs``).
      settings: a ``sampler.Settings``; its ``temperature``, ``top_k`` and ``truncation`` are used.
      scale: of the guidance, float32 [], or None.

    Returns:
      float32 [B, N, K], normalised.
    """

    def of_chunk(logits):
        logits = logits.astype(jnp.float32)
        if scale is not None:
            logits = _guided_logits(logits[::2], logits[1::2], scale)
        log_x0 = jax.nn.log_softmax(logits / settings.temperature)
        if settings.top_k is not None:
            log_x0 = keep_top_k(log_x0, settings.top_k)
        return log_x0 if settings.truncation is None else truncate(log_x0, settings.truncation)

    return chunks.over_tokens(of_chunk, answers, axis=1)
