"""Perceptual distance: how far apart two pictures are in the features of a network that sees.

For features f_l [h, w, C] of layer l, scaled to unit length at every position, and weights w_l [C]:

    distance(a, b) = sum over l of mean over positions of sum over c of w_lc (f_lc(a) - f_lc(b))^2

(Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018,
eq. 1: LPIPS.) "vgg16" is LPIPS itself, the term of the published tokenizers, and needs weights that
are not ours to hand out. "squeezenet" is SqueezeNet 1.1 (Iandola et al., 2016), a fortieth of the
work. Its layers all have weight 1 / 8; its last one is the evidence of the 1000 classes. With
random parameters either of them is still a distance (Amir and Weiss, "Understanding and Simplifying
Perceptual Distances", CVPR 2021).

The parameters come from ``interop.perceptual_files`` or ``init_params``.

Letters: B batch, S image side in pixels, h/w side of a layer, C channels.
"""

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqd_jax.models import functional
from vqd_jax.models.convolution import Conv

NETWORKS = ("squeezenet", "vgg16")

# Squeezed and expanded channels of the eight fire modules. A 3x3 maximum halves the side before the
# first, the third and the fifth.
_FIRES = ((16, 128), (16, 128), (32, 256), (32, 256), (48, 384), (48, 384), (64, 512), (64, 512))
_POOLED_FIRES = (0, 2, 4)
# Features are taken after the first convolution, these modules and the classes.
_SEEN_FIRES = (1, 3, 4, 5, 6, 7)
# Channels of the convolutions of VGG16; the last of every group is seen.
_VGG = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_SMALLEST = {"squeezenet": 8, "vgg16": 16}


@dataclasses.dataclass(frozen=True)
class PerceptualConfig:
    """Which network sees.

    Attributes:
      network: "squeezenet" or "vgg16".
      dtype: of its convolutions, "float32" or "bfloat16". Parameters, features of unit length and
        distances are float32.

    Raises:
      ValueError: a value is impossible; the message names the field.
    """

    network: str = "squeezenet"
    dtype: str = "float32"

    def __post_init__(self):
        if self.network not in NETWORKS:
            raise ValueError(f"network={self.network!r}: must be one of {NETWORKS}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}: must be 'float32' or 'bfloat16'")


def _max_pool(x: jax.Array, side: int) -> jax.Array:
    """Halves H and W by the maximum of ``side`` x ``side``, padded at the end; [B, H, W, C].

    Written with maxima of slices: the gradient of a window reduction takes many times as long on a
    CPU.
    """
    for axis in (1, 2):
        half = -(-x.shape[axis] // 2)
        width = [(0, 0)] * 4
        width[axis] = (0, 2 * half + side - 2 - x.shape[axis])
        padded = jnp.pad(x, width, constant_values=-jnp.inf)
        x = functools.reduce(
            jnp.maximum,
            (
                jax.lax.slice_in_dim(padded, start, start + 2 * half - 1, 2, axis)
                for start in range(side)
            ),
        )
    return x


class _Fire(nnx.Module):
    """Squeezes with 1x1, expands with 1x1 and 3x3; [B, H, W, in] -> [B, H, W, expanded]."""

    def __init__(self, channels: int, squeezed: int, expanded: int, dtype: Any, rngs: nnx.Rngs):
        make = functools.partial(Conv, dtype=dtype, rngs=rngs)
        self.squeeze = make(channels, squeezed, 1)
        self.expand1 = make(squeezed, expanded // 2, 1)
        self.expand3 = make(squeezed, expanded // 2, 3)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.squeeze(x))
        return jax.nn.relu(jnp.concatenate([self.expand1(x), self.expand3(x)], axis=-1))


class _SqueezeNet(nnx.Module):
    """Pixels [B, S, S, 3] in [-1, 1] -> eight layers of features."""

    def __init__(self, config: PerceptualConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        # The network was trained without padding here. With it, the last row and column count too.
        self.conv1 = Conv(3, 64, 3, 2, padding=1, dtype=dtype, rngs=rngs)
        inputs = [64, *(expanded for _, expanded in _FIRES[:-1])]
        self.fire = nnx.List(
            [_Fire(n, *sizes, dtype, rngs) for n, sizes in zip(inputs, _FIRES, strict=True)]
        )
        self.conv10 = Conv(512, 1000, 1, dtype=dtype, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> list[jax.Array]:
        # Blue, green, red in 0..255 without their means.
        means = np.array([103.94, 116.78, 123.68], np.float32)[None, None, None]
        x = jax.nn.relu(self.conv1(pixels[..., ::-1] * 127.5 + 127.5 - means))
        seen = [x]
        for index, fire in enumerate(self.fire):
            x = fire(_max_pool(x, 3) if index in _POOLED_FIRES else x)
            if index in _SEEN_FIRES:
                seen.append(x)
        return [*seen, jax.nn.relu(self.conv10(x))]

    def weights(self) -> list[jax.Array | float]:
        """Weights of the layers."""
        return [1 / 8] * 8


class _Vgg16(nnx.Module):
    """Pixels [B, S, S, 3] in [-1, 1] -> five layers of features; ``head`` has their weights [C]."""

    def __init__(self, config: PerceptualConfig, *, rngs: nnx.Rngs):
        widths = [width for group in _VGG for width in group]
        pairs = zip([3, *widths[:-1]], widths, strict=True)
        dtype = jnp.dtype(config.dtype)
        self.conv = nnx.List([Conv(n, m, 3, dtype=dtype, rngs=rngs) for n, m in pairs])
        self.head = nnx.List([nnx.Param(jnp.ones(group[-1])) for group in _VGG])

    def __call__(self, pixels: jax.Array) -> list[jax.Array]:
        shift = np.array([-0.030, -0.088, -0.188], np.float32)[None, None, None]
        scale = np.array([0.458, 0.448, 0.450], np.float32)[None, None, None]
        x, seen, convolutions = (pixels - shift) / scale, [], iter(self.conv)
        for group in _VGG:
            x = _max_pool(x, 2) if seen else x
            for _ in group:
                x = jax.nn.relu(next(convolutions)(x))
            seen.append(x)
        return seen

    def weights(self) -> list[jax.Array | float]:
        """Weights of the layers."""
        return [head[...] for head in self.head]


def _make(config: PerceptualConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    network = _SqueezeNet if config.network == "squeezenet" else _Vgg16
    return network(config, rngs=rngs)


abstract_params = functools.partial(functional.abstract, _make)
bind = functools.partial(functional.bind, _make)


def init_params(config: PerceptualConfig, key: jax.Array) -> Any:
    """Random parameters: kernels of variance 2 / fan-in, biases 0, weights of channels 1 / C."""

    def value(path, leaf, noise):
        if leaf.ndim == 1:
            is_head = path[0].key == "head"
            return jnp.full(leaf.shape, 1 / leaf.size if is_head else 0.0)
        return noise * math.sqrt(2 / math.prod(leaf.shape[:-1]))

    return functional.draw(abstract_params(config), key, value)


def _unit(x: jax.Array) -> jax.Array:
    """Features in float32, scaled to unit length at every position; zeros stay zeros."""
    x = x.astype(jnp.float32)
    squared = jnp.sum(x**2, axis=-1, keepdims=True)
    # The root has no gradient at 0.
    length = jnp.sqrt(jnp.where(squared > 0, squared, 1.0))
    return x / (length + 1e-10)


def distance(params: Any, a: jax.Array, b: jax.Array, *, config: PerceptualConfig) -> jax.Array:
    """The perceptual distance of every pair of pictures.

    A gradient flows into both; where ``b`` is a constant, nothing is computed for it.

    Args:
      params: as ``init_params`` makes them.
      a: float [B, S, S, 3] in [-1, 1]; values beyond are not clipped.
      b: the same.
      config: of the network.

    Returns:
      float32 [B]; 0 for equal pictures, to rounding.
    """
    chex.assert_equal_shape([a, b])
    least = _SMALLEST[config.network]
    if a.shape[1] < least or a.shape[2] < least:
        raise ValueError(f"pictures of {a.shape[1:3]} pixels: {config.network} needs {least}")
    network, total = bind(config, params), 0.0
    layers = zip(network(a), network(b), network.weights(), strict=True)
    for seen_a, seen_b, weight in layers:
        squared = (_unit(seen_a) - _unit(seen_b)) ** 2
        if not isinstance(weight, float):
            weight = weight[None, None, None]
        total += jnp.mean(jnp.sum(squared * weight, axis=-1), axis=(1, 2))
    return total


def classes(params: Any, pixels: jax.Array, *, config: PerceptualConfig) -> jax.Array:
    """Evidence of the 1000 classes of ImageNet, float [B, 1000], of SqueezeNet alone."""
    return jnp.mean(bind(config, params)(pixels)[-1].astype(jnp.float32), axis=(1, 2))
