"""The image tokenizer: a convolutional autoencoder with a codebook in the middle (VQGAN).

The network is that of Esser et al., "Taming Transformers for High-Resolution Image Synthesis"
(CVPR 2021). The modules have the names of its published weights, so that a table of keys is enough
to load them. In ``down`` and ``up``, index 0 is full resolution.

Letters: B batch, H/W image side (S where they are equal), h/w side of the token grid, N = h w image
tokens, C channels, K codes, E codebook dimension, F entries of the codebook (F = K without a
remap). Channels are last.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vqd_jax.errors import require_at_least, require_choice
from vqd_jax.models import functional, quantizer
from vqd_jax.models.convolution import Conv, GroupNorm

# The name of the outputs of all blocks: a backward pass may keep these alone.
BLOCK = "block"
QUANTIZERS = ("nearest", "gumbel")
# The parts of the parameters that turn latents into pictures.
DECODER = ("post_quant_conv", "decoder")


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of an autoencoder.

    Attributes:
      image_size: S, in pixels.
      channels: width at full resolution.
      channel_multipliers: width of each level as a multiple of ``channels``, full resolution
        first; every level but the last halves the side.
      num_res_blocks: residual blocks of a level in the encoder; the decoder has one more.
      attention_resolutions: sides, in pixels, of the levels with attention after every block.
      latent_channels: width between the encoder and the 1x1 convolution to E.
      codebook_dim: E.
      num_codes: K, the codes that the denoiser predicts.
      norm_groups: groups of every group normalisation; 32 in all published weights.
      quantizer: how latents become codes: "nearest" takes the closest entry of the codebook;
        "gumbel" has a 1x1 convolution to F logits (the tokenizer of the published text models).
      codebook_size: F, where a remap keeps K of F codes; None is F = K without a remap.

    Raises:
      ValueError: a value is impossible; the message names the field.
    """

    image_size: int
    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    latent_channels: int
    codebook_dim: int
    num_codes: int
    norm_groups: int = 32
    quantizer: str = "nearest"
    codebook_size: int | None = None

    def __post_init__(self):
        # Configs arrive with lists; a tuple keeps the dataclass hashable.
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(
                f"channel_multipliers={self.channel_multipliers}: give one positive integer for "
                "each level"
            )
        sizes = ("image_size", "channels", "num_res_blocks", "latent_channels", "codebook_dim")
        require_at_least(self, **dict.fromkeys(sizes, 1), num_codes=2, norm_groups=1)
        if self.image_size % self.downsampling:
            raise ValueError(
                f"image_size={self.image_size}: must be a multiple of {self.downsampling}, the "
                f"downsampling of channel_multipliers={self.channel_multipliers}"
            )
        if self.channels % self.norm_groups:
            raise ValueError(
                f"channels={self.channels}: must be a multiple of norm_groups={self.norm_groups}"
            )
        require_choice(self, quantizer=QUANTIZERS)
        if self.num_entries < self.num_codes:
            raise ValueError(
                f"codebook_size={self.codebook_size}: must be at least num_codes={self.num_codes}"
            )
        sides = [self.image_size >> level for level in range(len(self.channel_multipliers))]
        unknown = [side for side in self.attention_resolutions if side not in sides]
        if unknown:
            raise ValueError(
                f"attention_resolutions={self.attention_resolutions}: {unknown[0]} is not the side "
                f"of a level; the levels have {sides}"
            )

    @property
    def widths(self) -> list[int]:
        """Channels of every level, full resolution first."""
        return [self.channels * multiplier for multiplier in self.channel_multipliers]

    @property
    def downsampling(self) -> int:
        """Pixels that one token covers along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def grid_size(self) -> int:
        """h = w, the side of the token grid."""
        return self.image_size // self.downsampling

    @property
    def num_tokens(self) -> int:
        """N, the tokens of an image."""
        return self.grid_size**2

    @property
    def num_entries(self) -> int:
        """F, the entries of the codebook."""
        return self.num_codes if self.codebook_size is None else self.codebook_size


def from_pixels(pixels: jax.Array) -> jax.Array:
    """uint8 [...] in 0..255 -> float32 [...] in [-1, 1]."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0


def to_pixels(images: jax.Array) -> jax.Array:
    """float [...] in [-1, 1] -> uint8 [...] in 0..255, clipped and rounded to nearest.

    The published code truncates instead; rounding makes ``from_pixels`` reversible.
    """
    return jnp.round((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


class _Layers(NamedTuple):
    """What all layers of one network share: how they are made."""

    config: AutoencoderConfig
    rngs: nnx.Rngs

    def conv(self, in_channels: int, out_channels: int, side: int = 3, **options: Any) -> Conv:
        return Conv(in_channels, out_channels, side, rngs=self.rngs, **options)

    def norm(self, channels: int) -> GroupNorm:
        return GroupNorm(channels, self.config.norm_groups)


class ResBlock(nnx.Module):
    """x + (normalise, swish, convolve, twice); [B, H, W, in] -> [B, H, W, out]."""

    def __init__(self, in_channels: int, out_channels: int, layers: _Layers):
        self.norm1 = layers.norm(in_channels)
        self.conv1 = layers.conv(in_channels, out_channels)
        self.norm2 = layers.norm(out_channels)
        self.conv2 = layers.conv(out_channels, out_channels)
        changes = in_channels != out_channels
        self.nin_shortcut = layers.conv(in_channels, out_channels, 1) if changes else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(self.norm1(x, swish=True))
        y = self.conv2(self.norm2(y, swish=True))
        if self.nin_shortcut is not None:
            x = self.nin_shortcut(x)
        return checkpoint_name(x + y, BLOCK)


class AttentionBlock(nnx.Module):
    """x + single-head self-attention over all positions; keeps [B, H, W, C]."""

    def __init__(self, channels: int, layers: _Layers):
        self.norm = layers.norm(channels)
        self.q = layers.conv(channels, channels, 1)
        self.k = layers.conv(channels, channels, 1)
        self.v = layers.conv(channels, channels, 1)
        self.proj_out = layers.conv(channels, channels, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        y = self.norm(x)
        q, k, v = (f(y).reshape(batch, height * width, channels) for f in (self.q, self.k, self.v))
        scores = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32)
        shares = jax.nn.softmax(scores * channels**-0.5, axis=-1).astype(v.dtype)
        mixed = jnp.einsum("bqk,bkc->bqc", shares, v)
        return checkpoint_name(x + self.proj_out(mixed.reshape(x.shape)), BLOCK)


class Downsample(nnx.Module):
    """Halves the side; [B, H, W, C] -> [B, H/2, W/2, C]."""

    def __init__(self, channels: int, layers: _Layers):
        # The published network pads on the right and at the bottom only.
        self.conv = layers.conv(channels, channels, stride=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles the side by repetition, then convolves; [B, H, W, C] -> [B, 2H, 2W, C]."""

    def __init__(self, channels: int, layers: _Layers):
        self.conv = layers.conv(channels, channels, upsample=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class _Level(nnx.Module):
    """One resolution: ``num_blocks`` residual blocks, each with attention where it is asked for."""

    def __init__(
        self,
        in_channels: int,
        index: int,
        num_blocks: int,
        layers: _Layers,
    ):
        config = layers.config
        width = config.widths[index]
        attends = config.image_size >> index in config.attention_resolutions
        inputs = [in_channels] + [width] * (num_blocks - 1)
        self.block = nnx.List([ResBlock(n, width, layers) for n in inputs])
        self.attn = nnx.List([AttentionBlock(width, layers) for _ in range(num_blocks * attends)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return x


class _Middle(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, layers: _Layers):
        self.block_1 = ResBlock(channels, channels, layers)
        self.attn_1 = AttentionBlock(channels, layers)
        self.block_2 = ResBlock(channels, channels, layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nnx.Module):
    """Images [B, H, W, 3] -> features [B, h, w, latent_channels]."""

    def __init__(self, layers: _Layers):
        config, widths, levels = layers.config, layers.config.widths, []
        self.conv_in = layers.conv(3, config.channels)
        for index, in_channels in enumerate([config.channels, *widths[:-1]]):
            level = _Level(in_channels, index, config.num_res_blocks, layers)
            if index < len(widths) - 1:
                level.downsample = Downsample(widths[index], layers)
            levels.append(level)
        self.down = nnx.List(levels)
        self.mid = _Middle(widths[-1], layers)
        self.norm_out = layers.norm(widths[-1])
        self.conv_out = layers.conv(widths[-1], config.latent_channels)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.conv_in(images)
        for index, level in enumerate(self.down):
            x = level(x)
            if index < len(self.down) - 1:
                x = level.downsample(x)
        return self.conv_out(self.norm_out(self.mid(x), swish=True))


class Decoder(nnx.Module):
    """Features [B, h, w, latent_channels] -> images [B, H, W, 3], not limited to [-1, 1]."""

    def __init__(self, layers: _Layers):
        config, widths, levels = layers.config, layers.config.widths, []
        self.conv_in = layers.conv(config.latent_channels, widths[-1])
        self.mid = _Middle(widths[-1], layers)
        for index, in_channels in enumerate([*widths[1:], widths[-1]]):
            level = _Level(in_channels, index, config.num_res_blocks + 1, layers)
            if index > 0:
                level.upsample = Upsample(widths[index], layers)
            levels.append(level)
        self.up = nnx.List(levels)
        self.norm_out = layers.norm(widths[0])
        self.conv_out = layers.conv(widths[0], 3)

    def __call__(self, latents: jax.Array) -> jax.Array:
        x = self.mid(self.conv_in(latents))
        for index in reversed(range(len(self.up))):
            level = self.up[index]
            x = level(x)
            if index > 0:
                x = level.upsample(x)
        return self.conv_out(self.norm_out(x, swish=True))


class Autoencoder(nnx.Module):
    """Images <-> codes. It computes in the dtype of what it is given; parameters are float32.

    Args:
      config: sizes.
      rngs: with a ``params`` stream.
    """

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        layers = _Layers(config, rngs)
        self.config = config
        self.encoder = Encoder(layers)
        self.decoder = Decoder(layers)
        self.quant_conv = layers.conv(config.latent_channels, config.codebook_dim, 1)
        self.post_quant_conv = layers.conv(config.codebook_dim, config.latent_channels, 1)
        self.quantize = quantizer.Codebook(
            config.num_entries, config.codebook_dim, gumbel=config.quantizer == "gumbel", rngs=rngs
        )
        remap = None
        if config.codebook_size is not None:
            remap = quantizer.Remap(config.codebook_size, config.num_codes)
        self.remap = remap

    def encode(self, images: jax.Array) -> jax.Array:
        """Images, float [B, H, W, 3] in [-1, 1] -> latents before quantisation [B, h, w, E]."""
        size = self.config.image_size
        chex.assert_shape(images, (None, size, size, 3))
        return self.quant_conv(self.encoder(images))

    def codes(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Images -> codes, row by row.

        Args:
          images: float [B, H, W, 3] in [-1, 1].
          key: PRNG key; a Gumbel quantiser then draws the codes, as the published code does. None
            takes its most likely codes. The nearest quantiser has nothing to draw.

        Returns:
          int32 [B, N] in 0..K-1.
        """
        codes = self.quantize.codes(self.encode(images), key)
        if self.remap is not None:
            codes = self.remap.to_codes(codes)
        return codes.reshape(images.shape[0], self.config.num_tokens)

    def decode_latents(self, z: jax.Array) -> jax.Array:
        """Latents [B, h, w, E] -> images [B, H, W, 3], not limited to [-1, 1]."""
        grid = self.config.grid_size
        chex.assert_shape(z, (None, grid, grid, self.config.codebook_dim))
        return self.decoder(self.post_quant_conv(z))

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes, int32 [B, N], row by row -> images, float [B, H, W, 3] in [-1, 1]."""
        grid = self.config.grid_size
        chex.assert_shape(codes, (None, self.config.num_tokens))
        if self.remap is not None:
            codes = self.remap.to_full(codes)
        z = quantizer.lookup(codes, self.quantize.embedding[...])
        images = self.decode_latents(z.reshape(codes.shape[0], grid, grid, -1))
        return jnp.clip(images, -1.0, 1.0)


abstract_params = functools.partial(functional.abstract, Autoencoder)
bind = functools.partial(functional.bind, Autoencoder)


def encode(params: Any, images: jax.Array, *, config: AutoencoderConfig) -> jax.Array:
    """Images uint8 [B, S, S, 3] -> codes int32 [B, N]; the most likely ones of a Gumbel quantiser.

    Pure; compile it with ``jax.jit(functools.partial(encode, config=config))``.
    """
    return bind(config, params).codes(from_pixels(images))


def decode(
    params: Any, codes: jax.Array, *, config: AutoencoderConfig, dtype: str = "float32"
) -> jax.Array:
    """Codes int32 [B, N] -> images uint8 [B, S, S, 3]; pure, like ``encode``.

    Args:
      params: of the autoencoder.
      codes: int32 [B, N].
      config: sizes.
      dtype: that the decoder computes in.
    """

    def cast(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    images = bind(config, jax.tree.map(cast, params)).decode(codes)
    return to_pixels(images.astype(jnp.float32))


def init_params(config: AutoencoderConfig, key: jax.Array) -> Any:
    """Initial parameters of an autoencoder.

    Convolution kernels are normal with variance 1 / fan-in, codes standard normal, biases 0 and
    scales 1; a remap keeps the first K codes.

    Args:
      config: sizes.
      key: PRNG key.

    Returns:
      A nested dict of float32 arrays with the top-level keys ``encoder``, ``decoder``,
      ``quant_conv``, ``post_quant_conv`` and ``quantize`` (the codebook); where the config has a
      remap, also ``remap``, with int32 ids.
    """

    def value(path, leaf, noise):
        kind = path[-1].key
        if kind == "scale":
            return jnp.ones(leaf.shape)
        if kind == "bias":
            return jnp.zeros(leaf.shape)
        if kind == "full_to_code":
            return quantizer.first_codes(leaf.size, config.num_codes)
        fan_in = 1 if kind == "embedding" else math.prod(leaf.shape[:-1])
        return noise * fan_in**-0.5

    return functional.draw(abstract_params(config), key, value)


def with_remap(
    config: AutoencoderConfig, params: Any, full_to_code: np.ndarray
) -> tuple[AutoencoderConfig, Any]:
    """The same autoencoder without the codes that a remap leaves out.

    Args:
      config: sizes, without a remap.
      params: its parameters.
      full_to_code: integers [num_codes]: id of every code (see ``quantizer.build_remap``).

    Returns:
      The new config, with the number of ids as ``num_codes``, and the new parameters.

    Raises:
      ValueError: ``full_to_code`` is no remap of this codebook.
    """
    if config.codebook_size is not None:
        raise ValueError("it has a remap")
    num_codes = quantizer.num_remapped(full_to_code)
    if len(full_to_code) != config.num_codes:
        raise ValueError(
            f"it is for {len(full_to_code)} codes, the codebook has {config.num_codes}"
        )
    config = dataclasses.replace(config, num_codes=num_codes, codebook_size=config.num_codes)
    remap = {"full_to_code": np.asarray(full_to_code, np.int32)}
    return config, {**params, "remap": remap}
