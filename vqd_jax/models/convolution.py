"""Convolutions and normalisations of the image networks, written for speed on every platform.

Compilers for GPUs and TPUs choose good programs for a convolution themselves. On a CPU, some that
are written out here are several times as fast; docs/performance.md has their times. A program is
chosen for the platform that it is compiled for, whatever machine compiles it.

Letters: B batch, H/W side of the input, h/w side of the output, k side of the kernel, C channels of
the input, D of the output. Channels are last.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# Rows and columns that are added before and after.
Padding = tuple[tuple[int, int], tuple[int, int]]

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# So many channels, those of pixels, leave most of a vector unit unused.
_FEW = 4
# From so many pairs of channels on, products are faster than XLA's gradient of a kernel.
_MANY = 512
# Pixels of a block whose channels stay in the cache.
_BLOCK = 2048


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
      [B, h, w, D], the dtype of ``x``. On a CPU it may differ by rounding from that of another
      platform.
    """
    if isinstance(padding, int):
        padding = ((padding, padding), (padding, padding))

    plain = functools.partial(_plain, stride=stride, padding=padding)
    side, _, in_channels, out_channels = kernel.shape
    few = min(in_channels, out_channels) <= _FEW
    if side > 1 and not few and in_channels * out_channels >= _MANY:
        return _conv_of_many(x, kernel, stride, padding)
    if side == 1 or not few or stride > 1:
        return plain(x, kernel)
    written_out = _few_inputs if in_channels <= out_channels else _few_outputs
    return jax.lax.platform_dependent(
        jnp.pad(x, ((0, 0), *padding, (0, 0))),
        x,
        kernel,
        cpu=lambda padded, _, kernel: written_out(padded, kernel),
        default=lambda _, x, kernel: plain(x, kernel),
    )


def _plain(x, kernel, stride, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=_DIMENSIONS
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv_of_many(x, kernel, stride, padding):
    """XLA's convolution, with a gradient of the kernel that is fast on a CPU, too."""
    return _plain(x, kernel, stride, padding)


def _conv_of_many_backward(stride, padding, saved, gradient):
    x, kernel = saved

    def plain(x, kernel, gradient):
        return jax.vjp(lambda k: _plain(x, k, stride, padding), kernel)[1](gradient)[0]

    def products(x, kernel, gradient):
        padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        return _kernel_gradient(padded, gradient, len(kernel), stride).astype(kernel.dtype)

    by_x = jax.vjp(lambda x: _plain(x, kernel, stride, padding), x)[1](gradient)[0]
    return by_x, jax.lax.platform_dependent(x, kernel, gradient, cpu=products, default=plain)


_conv_of_many.defvjp(
    lambda x, kernel, stride, padding: (_plain(x, kernel, stride, padding), (x, kernel)),
    _conv_of_many_backward,
)


def _kernel_gradient(x: jax.Array, gradient: jax.Array, side: int, stride: int) -> jax.Array:
    """The gradient of a kernel, float32 [k, k, C, D]: for each of its taps a product of all pixels.

    Args:
      x: [B, H, W, C], padded.
      gradient: of the result, [B, h, w, D].
      side: k.
      stride: of both axes.
    """
    batch, height, width, out_channels = gradient.shape

    def products(x, gradient):
        """All taps of some rows: [b, ., W, C] and [b, r, w, D] -> [k k, C, D]."""
        down, right = (stride * (n - 1) + 1 for n in gradient.shape[1:3])
        seen = [
            x[:, i : i + down : stride, j : j + right : stride].reshape(-1, x.shape[-1])
            for i in range(side)
            for j in range(side)
        ]
        pixels = gradient.reshape(-1, out_channels)
        return jnp.stack([jnp.dot(p.T, pixels, preferred_element_type=jnp.float32) for p in seen])

    if batch * height * width <= 4 * _BLOCK:
        return products(x, gradient).reshape(side, side, -1, out_channels)
    rows = max(
        n for n in range(1, height + 1) if height % n == 0 and n * width <= max(_BLOCK, width)
    )
    parts = height // rows

    def add(number, total):
        image, row = number // parts, number % parts * rows
        size = stride * (rows - 1) + side
        some_x = jax.lax.dynamic_slice_in_dim(x, image, 1, 0)
        some_x = jax.lax.dynamic_slice_in_dim(some_x, stride * row, size, 1)
        some = jax.lax.dynamic_slice_in_dim(gradient, image, 1, 0)
        return total + products(some_x, jax.lax.dynamic_slice_in_dim(some, row, rows, 1))

    zeros = jnp.zeros((side * side, x.shape[-1], out_channels))
    total = jax.lax.fori_loop(0, batch * parts, add, zeros)
    return total.reshape(side, side, -1, out_channels)


def depthwise_conv(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Padding
) -> jax.Array:
    """A convolution of each channel by itself, without a bias.

    Args:
      x: [B, H, W, C].
      kernel: [k, k, 1, C], the dtype of ``x``.
      stride: of both axes.
      padding: zeros, ((top, bottom), (left, right)).

    Returns:
      [B, h, w, C], the dtype of ``x``. On a CPU it may differ by rounding from that of another
      platform.
    """

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            padding,
            dimension_numbers=_DIMENSIONS,
            feature_group_count=x.shape[-1],
        )

    def shifted(x, kernel):
        side, x = kernel.shape[0], jnp.pad(x, ((0, 0), *padding, (0, 0)))
        bottom, right = (n - side + 1 for n in x.shape[1:3])
        return sum(
            x[:, i : i + bottom : stride, j : j + right : stride]
            * kernel[i, j, 0][None, None, None]
            for i in range(side)
            for j in range(side)
        )

    return jax.lax.platform_dependent(x, kernel, cpu=shifted, default=plain)


def same_padding(shape: tuple[int, int], side: int, stride: int) -> Padding:
    """TensorFlow's padding for an input of this height and width: the odd row or column is last."""

    def around(length):
        total = max((-(-length // stride) - 1) * stride + side - length, 0)
        return total // 2, total - total // 2

    return around(shape[0]), around(shape[1])


def _patches(x: jax.Array, side: int) -> jax.Array:
    """What a kernel sees at every place: [B, H, W, C] -> [B h w, k k C]."""
    height, width = x.shape[1] - side + 1, x.shape[2] - side + 1
    parts = [x[:, i : i + height, j : j + width] for i in range(side) for j in range(side)]
    return jnp.concatenate(parts, axis=-1).reshape(-1, side * side * x.shape[-1])


def _few_inputs(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """One product of all patches of padded ``x`` with the kernel."""
    side, out_channels = kernel.shape[0], kernel.shape[-1]
    height, width = x.shape[1] - side + 1, x.shape[2] - side + 1
    product = _patches(x, side) @ kernel.reshape(-1, out_channels)
    return product.reshape(x.shape[0], height, width, out_channels)


@jax.custom_vjp
def _few_outputs(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """One product of all pixels [B H W, C] of padded ``x``, whose parts [D] are then added up."""
    side, _, in_channels, out_channels = kernel.shape
    height, width = x.shape[1] - side + 1, x.shape[2] - side + 1
    columns = kernel.transpose(2, 0, 1, 3).reshape(in_channels, -1)
    product = (x.reshape(-1, in_channels) @ columns).reshape(*x.shape[:3], side, side, out_channels)
    return sum(
        product[:, i : i + height, j : j + width, i, j] for i in range(side) for j in range(side)
    )


def _few_outputs_backward(saved, gradient):
    """Both gradients are products with the patches of the small gradient of the result."""
    x, kernel = saved
    side, _, in_channels, out_channels = kernel.shape
    around = (side - 1, side - 1)
    patches = _patches(jnp.pad(gradient, ((0, 0), around, around, (0, 0))), side)
    turned = kernel[::-1, ::-1]
    by_x = patches @ turned.transpose(0, 1, 3, 2).reshape(-1, in_channels)
    by_kernel = (x.reshape(-1, in_channels).T @ patches).reshape(
        in_channels, side, side, out_channels
    )
    return by_x.reshape(x.shape), by_kernel.transpose(1, 2, 0, 3)[::-1, ::-1]


_few_outputs.defvjp(lambda x, kernel: (_few_outputs(x, kernel), (x, kernel)), _few_outputs_backward)


def upsampled_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Repeats every pixel 2 x 2, then convolves with a 3x3 kernel and one zero on every side.

    On a CPU, four 2x2 convolutions at the low resolution make the four pixels of every block: nine
    products become four.

    Args:
      x: [B, H, W, C].
      kernel: [3, 3, C, D], the dtype of ``x``.

    Returns:
      [B, 2H, 2W, D].
    """
    return jax.lax.platform_dependent(x, kernel, cpu=_four_convolutions, default=_repeat_and_conv)


def _repeat_and_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels)).reshape(
        batch, 2 * height, 2 * width, channels
    )
    return conv(x, kernel, padding=1)


def _four_convolutions(x: jax.Array, kernel: jax.Array) -> jax.Array:
    batch, height, width, _ = x.shape
    rows = []
    for i, by_row in enumerate(_halves(kernel, 0)):
        row = [
            conv(x, part, padding=((1 - i, i), (1 - j, j)))
            for j, part in enumerate(_halves(by_row, 1))
        ]
        rows.append(jnp.stack(row, axis=3))
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, kernel.shape[-1])


def _halves(kernel: jax.Array, axis: int) -> list[jax.Array]:
    """Kernels of two taps for the first and the second pixel of a pair; its neighbours are equal.

    The first sees (a, b + c), the second (a + b, c).
    """
    a, b, c = (jax.lax.slice_in_dim(kernel, i, i + 1, axis=axis) for i in range(3))
    return [jnp.concatenate([a, b + c], axis), jnp.concatenate([a + b, c], axis)]


class Conv(nnx.Module):
    """A convolution with the parameters of ``nnx.Conv``: ``kernel`` [k, k, C, D] and ``bias`` [D].

    Args:
      in_channels: C.
      out_channels: D.
      side: k.
      stride: of both axes.
      padding: zeros on every side; None keeps the side at stride 1.
      use_bias: whether there is a bias.
      upsample: whether every pixel is repeated 2 x 2 before; for 3x3 kernels.
      dtype: of the computation and of the result; None is that of the input. Parameters are
        float32 when they are made.
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
        upsample: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        shape = (side, side, in_channels, out_channels)
        draw = jax.nn.initializers.lecun_normal()
        self.kernel = nnx.Param(draw(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_channels)) if use_bias else None
        self.stride, self.upsample, self.dtype = stride, upsample, dtype
        self.padding = side // 2 if padding is None else padding

    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = x.dtype if self.dtype is None else self.dtype
        x, kernel = x.astype(dtype), self.kernel[...].astype(dtype)
        if self.upsample:
            y = upsampled_conv(x, kernel)
        else:
            y = conv(x, kernel, stride=self.stride, padding=self.padding)
        if self.bias is None:
            return y
        return y + self.bias[...].astype(dtype)[None, None, None]


class GroupNorm(nnx.Module):
    """Group normalisation with the parameters of ``nnx.GroupNorm``, maybe followed by swish.

    Sums over the pixels of every channel come first, those over the channels of a group after, so
    that the large arrays are met once and never split into groups.

    Args:
      channels: C.
      num_groups: a divisor of C.
      epsilon: added to the variance.
      dtype: of the result; None is that of the input. Statistics are float32.
    """

    def __init__(self, channels: int, num_groups: int, *, epsilon: float = 1e-6, dtype: Any = None):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.num_groups, self.epsilon, self.dtype = num_groups, epsilon, dtype

    def __call__(self, x: jax.Array, *, swish: bool = False) -> jax.Array:
        """[B, H, W, C] -> the same shape."""
        batch, height, width, channels = x.shape
        dtype = x.dtype if self.dtype is None else self.dtype
        x, scale, bias = (a.astype(jnp.float32) for a in (x, self.scale[...], self.bias[...]))
        share = self.num_groups / (height * width * channels)

        def of_groups(sums):
            """Means over groups, for every channel: [B, C] -> [B, C]."""
            means = jnp.sum(sums.reshape(batch, self.num_groups, -1), axis=-1) * share
            return jnp.repeat(means, channels // self.num_groups, axis=1)

        mean = of_groups(jnp.sum(x, axis=(1, 2)))
        variance = of_groups(jnp.sum(x**2, axis=(1, 2))) - mean**2
        factor = jax.lax.rsqrt(jnp.maximum(variance, 0.0) + self.epsilon) * scale[None]
        offset = bias[None] - mean * factor
        y = x * factor[:, None, None] + offset[:, None, None]
        return (jax.nn.swish(y) if swish else y).astype(dtype)
