"""Discriminators of patches: networks that tell reconstructions from pictures.

Every logit judges one patch of a picture (Isola et al., "Image-to-Image Translation with
Conditional Adversarial Networks", CVPR 2017). There are two kinds.

"patchgan" is that of the published tokenizers: 4x4 convolutions, half of them with stride 2, and
batch normalisation. "blurpool" follows Weber et al., "MaskBit" (2024): 3x3 convolutions, group
normalisation, and a blur before every halving, so that a shifted picture has shifted logits.
Here the blur stands before the convolution, which then runs at the lower resolution.

A discriminator serves in training alone. Batch normalisation therefore always takes the statistics
of the batch that it is given, and keeps no averages of them. They are the statistics of the whole
batch on all devices, since a mean over a sharded axis is one; the published code takes those of a
device. Pictures and reconstructions come in two calls, so each has its own statistics. With
gradient accumulation they are those of a part of the batch. Group normalisation depends on nothing
of this.

Letters: B batch, S image side in pixels, h/w side of the grid of logits, C channels.
"""

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from vqd_jax.errors import require_at_least
from vqd_jax.models import functional
from vqd_jax.models.convolution import Conv, GroupNorm

KINDS = ("patchgan", "blurpool")


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Shape of a discriminator.

    Attributes:
      kind: "patchgan", the published one, or "blurpool", the better one.
      channels: width of the first layer; it doubles with every halving, up to eight times.
      num_layers: how often the side is halved. A published one has 3, and a logit of it sees 70
        pixels along one side.
      norm_groups: groups of every group normalisation, for "blurpool".
      dtype: of the computation, "float32" or "bfloat16". Parameters, statistics and logits are
        float32.

    Raises:
      ValueError: a value is impossible; the message names the field.
    """

    kind: str = "blurpool"
    channels: int = 64
    num_layers: int = 3
    norm_groups: int = 16
    dtype: str = "float32"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: must be one of {KINDS}")
        require_at_least(self, channels=1, num_layers=1, norm_groups=1)
        if self.kind == "blurpool" and self.channels % self.norm_groups:
            raise ValueError(
                f"channels={self.channels}: must be a multiple of norm_groups={self.norm_groups}"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}: must be 'float32' or 'bfloat16'")

    @property
    def widths(self) -> list[int]:
        """Channels of all layers but the last, which makes logits."""
        return [self.channels * min(2**index, 8) for index in range(self.num_layers + 1)]


class BatchNorm(nnx.Module):
    """Normalises every channel by the mean and variance of the batch, in float32."""

    def __init__(self, channels: int, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        mean = jnp.mean(y, axis=(0, 1, 2), keepdims=True)
        variance = jnp.mean(jnp.square(y - mean), axis=(0, 1, 2), keepdims=True)
        factor = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...][None, None, None]
        return ((y - mean) * factor + self.bias[...][None, None, None]).astype(x.dtype)


def blur_pool(x: jax.Array) -> jax.Array:
    """Halves the side after a blur; [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), C].

    The kernel is (1, 3, 3, 1) / 8 along both axes (Zhang, "Making Convolutional Networks
    Shift-Invariant Again", ICML 2019). The border is repeated.
    """
    for axis in (1, 2):
        if x.shape[axis] % 2:
            x = jnp.concatenate([x, _edge(x, axis, -1)], axis)
        # Slices with a stride would do; their gradient is many times as slow on a CPU.
        pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
        even, odd = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in range(2))
        half = even.shape[axis]
        before = jnp.concatenate(
            [_edge(even, axis, 0), jax.lax.slice_in_dim(odd, 0, half - 1, axis=axis)], axis
        )
        after = jnp.concatenate(
            [jax.lax.slice_in_dim(even, 1, half, axis=axis), _edge(odd, axis, -1)], axis
        )
        x = (before + after) * 0.125 + (even + odd) * 0.375
    return x


def _edge(x: jax.Array, axis: int, index: int) -> jax.Array:
    return jax.lax.index_in_dim(x, index % x.shape[axis], axis)


def _leaky(x: jax.Array) -> jax.Array:
    return jax.nn.leaky_relu(x, 0.2)


class Discriminator(nnx.Module):
    """Images -> logits of patches, positive for pictures and negative for reconstructions.

    Args:
      config: sizes.
      rngs: with a ``params`` stream.
    """

    def __init__(self, config: DiscriminatorConfig, *, rngs: nnx.Rngs):
        self.config, widths = config, config.widths
        blurs, dtype = config.kind == "blurpool", jnp.dtype(config.dtype)
        make = functools.partial(Conv, side=3 if blurs else 4, padding=1, dtype=dtype, rngs=rngs)
        # A blur halves the side for "blurpool"; the stride of all layers but two for "patchgan".
        strides = [1 if blurs else 2] * config.num_layers + [1]
        pairs = zip([3, *widths[:-1]], widths, strides, strict=True)
        self.conv = nnx.List(
            [
                make(n, m, stride=stride, use_bias=index == 0)
                for index, (n, m, stride) in enumerate(pairs)
            ]
        )
        self.norm = nnx.List(
            [
                GroupNorm(n, config.norm_groups, dtype=dtype) if blurs else BatchNorm(n)
                for n in widths[1:]
            ]
        )
        self.to_logits = make(widths[-1], 1)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images, float [B, S, S, 3] in [-1, 1] -> logits float32 [B, h, w, 1]."""
        chex.assert_rank(images, 4)
        x = _leaky(self.conv[0](images))
        for index, norm in enumerate(self.norm):
            if self.config.kind == "blurpool":
                x = blur_pool(x)
            x = _leaky(norm(self.conv[index + 1](x)))
        return self.to_logits(x).astype(jnp.float32)


abstract_params = functools.partial(functional.abstract, Discriminator)
bind = functools.partial(functional.bind, Discriminator)


def init_params(config: DiscriminatorConfig, key: jax.Array) -> Any:
    """Initial parameters: a nested dict of float32 arrays.

    Those of "patchgan" are the published ones: kernels normal with deviation 0.02, scales normal
    around 1 with the same deviation. The kernels of "blurpool" have variance 2 / fan-in, its scales
    are 1. All biases are 0.

    Args:
      config: sizes.
      key: PRNG key.
    """

    def value(path, leaf, noise):
        kind = path[-1].key
        if kind == "bias":
            return jnp.zeros(leaf.shape)
        if config.kind == "patchgan":
            return 0.02 * noise + (1.0 if kind == "scale" else 0.0)
        if kind == "scale":
            return jnp.ones(leaf.shape)
        return noise * math.sqrt(2 / math.prod(leaf.shape[:-1]))

    return functional.draw(abstract_params(config), key, value)
