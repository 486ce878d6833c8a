"""How much of a picture is left in its reconstruction: PSNR and SSIM.

Letters: B batch, S image side in pixels, W side of a window.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

_SIGMA = 1.5
_WINDOW = 11
# (0.01 L)^2 and (0.03 L)^2 for values in 0..1.
_LEAST_MEAN, _LEAST_VARIANCE = 0.01**2, 0.03**2


def decibels(mean_squared_error: jax.Array) -> jax.Array:
    """The PSNR of a mean squared error of values in [-1, 1], whose peak-to-peak amplitude is 2."""
    return 10.0 * jnp.log10(4.0 / jnp.maximum(mean_squared_error, 1e-10))


def _unit(pixels: jax.Array) -> jax.Array:
    chex.assert_type(pixels, jnp.uint8)
    chex.assert_shape(pixels, (None, None, None, 3))
    return pixels.astype(jnp.float32) / 255.0


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio of every pair of pictures.

    Args:
      a, b: uint8 [B, S, S, 3].

    Returns:
      float32 [B], dB; at most 106 dB, for equal pictures.
    """
    return decibels(jnp.mean((2.0 * (_unit(a) - _unit(b))) ** 2, axis=(1, 2, 3)))


def _blur(size: int) -> np.ndarray:
    """The matrix [S - W + 1, S] of a Gaussian window along one axis."""
    width = min(_WINDOW, size - (size + 1) % 2)
    weights = np.exp(-0.5 * ((np.arange(width) - width // 2) / _SIGMA) ** 2)
    weights /= weights.sum()
    rows = [np.pad(weights, (i, size - width - i)) for i in range(size - width + 1)]
    return np.stack(rows).astype(np.float32)


def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Structural similarity of every pair of pictures (Wang et al., IEEE TIP 2004, eq. 13).

    The mean over the three colours and all windows that lie within the picture. A window is
    Gaussian, of 11 pixels and deviation 1.5; smaller pictures have smaller ones.

    Args:
      a, b: uint8 [B, S, S, 3].

    Returns:
      float32 [B]; 1 for equal pictures.
    """
    a, b = _unit(a), _unit(b)
    rows, columns = _blur(a.shape[1]), _blur(a.shape[2])

    def mean(x):
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum("is,bstc,jt->bijc", rows, x, columns, precision=exact)

    of_a, of_b = mean(a), mean(b)
    variance_a, variance_b = mean(a**2) - of_a**2, mean(b**2) - of_b**2
    covariance = mean(a * b) - of_a * of_b
    numerator = (2 * of_a * of_b + _LEAST_MEAN) * (2 * covariance + _LEAST_VARIANCE)
    denominator = (of_a**2 + of_b**2 + _LEAST_MEAN) * (variance_a + variance_b + _LEAST_VARIANCE)
    return jnp.mean(numerator / denominator, axis=(1, 2, 3))
