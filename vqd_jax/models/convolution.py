"""Convolutions of the image networks: one function that all of them call.

Letters: B batch, H/W side of the input, h/w side of the output, k side of the kernel, C channels.
Channels are last.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# Rows and columns that are added before and after.
Padding = tuple[tuple[int, int], tuple[int, int]]


def conv(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: int | Padding = 0
) -> jax.Array:
    """A convolution without a bias (a cross-correlation, as in every deep-learning library).

    Args:
      x: [B, H, W, C].
      kernel: [k, k, C, D], the dtype of ``x``.
      stride: of both axes.
      padding: zeros on every side, or ((top, bottom), (left, right)).

    Returns:
      [B, h, w, D], the dtype of ``x``.
    """
    if isinstance(padding, int):
        padding = ((padding, padding), (padding, padding))
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class Conv(nnx.Module):
    """A convolution with the parameters of ``nnx.Conv``: ``kernel`` [k, k, C, D] and ``bias`` [D].

    Args:
      in_channels: C.
      out_channels: D.
      side: k.
      stride: of both axes.
      padding: zeros on every side; None keeps the side at stride 1.
      use_bias: whether there is a bias.
      dtype: of the computation and of the result; parameters are float32.
      rngs: with a ``params`` stream.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        side: int,
        stride: int = 1,
        *,
        padding: int | Padding | None = None,
        use_bias: bool = True,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (side, side, in_channels, out_channels)
        draw = jax.nn.initializers.lecun_normal()
        self.kernel = nnx.Param(draw(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_channels)) if use_bias else None
        self.stride, self.dtype = stride, dtype
        self.padding = side // 2 if padding is None else padding

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(self.dtype)
        y = conv(x.astype(self.dtype), kernel, stride=self.stride, padding=self.padding)
        if self.bias is None:
            return y
        return y + self.bias[...].astype(self.dtype)[None, None, None]
