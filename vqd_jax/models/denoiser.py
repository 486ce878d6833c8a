"""The denoiser of VQ-Diffusion: a transformer that predicts clean codes from noisy tokens.

Every block is self-attention, cross-attention to all text positions and an MLP, each on a
normalised input and added to the stream. The norms before the attentions are AdaLN: scale and shift
come from a learned embedding of the time, with a table of its own for every norm (section 4.3 of
arXiv:2111.14822; "AdaLayerNorm" in the published code).

Letters: B batch, N image tokens, L text positions, D width, K codes, H heads, T steps.
"""

import dataclasses
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from vqd_jax.models import attention


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """Sizes of a denoiser.

    Attributes:
      num_codes: K; the mask token is one more input id, and no output.
      grid: rows and columns of the token grid, N = rows * columns.
      num_steps: T, rows of every time table.
      width, num_layers, num_heads: D, blocks, H.
      mlp_ratio: hidden width of the MLP over D.
      text_width: width of the text features.
      remat: key of ``attention.REMAT_POLICIES``.
      scan_unroll: layers in one turn of the loop over layers; more is faster on a CPU and slower to
        compile everywhere.
      init_std: standard deviation of the initial weights; 0.02 in the published code, whose narrow
        networks learn faster from larger ones.
      dtype: compute dtype, "float32" or "bfloat16"; parameters are float32.
    """

    num_codes: int
    grid: tuple[int, int]
    num_steps: int
    width: int
    num_layers: int
    num_heads: int
    text_width: int
    mlp_ratio: int = 4
    remat: str = "none"
    scan_unroll: int = 1
    init_std: float = 0.02
    dtype: str = "float32"

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(
                f"denoiser.width={self.width} is not divisible by "
                f"denoiser.num_heads={self.num_heads}"
            )


def normal(config: DenoiserConfig):
    """The initializer of every weight matrix and embedding."""
    return nnx.initializers.normal(config.init_std)


class TextContext(NamedTuple):
    """Keys and values of every layer's cross-attention, each [layers, B, L, H, D/H]."""

    keys: jax.Array
    values: jax.Array


class AdaLayerNorm(nnx.Module):
    """LN(h) (1 + scale) + shift, with scale and shift read off a learned embedding of the time."""

    def __init__(self, config: DenoiserConfig, *, make_linear, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(
            config.width, epsilon=1e-5, use_bias=False, use_scale=False, rngs=rngs
        )
        self.embedding = nnx.Embed(
            config.num_steps, config.width, embedding_init=normal(config), rngs=rngs
        )
        self.linear = make_linear(config.width, 2 * config.width, rngs=rngs)

    def modulation(self, time: jax.Array) -> jax.Array:
        """[..., 2, D] (scale, shift) of times [...] in 1..T."""
        scale_shift = self.linear(jax.nn.silu(self.embedding(time - 1)))
        return scale_shift.reshape(*time.shape, 2, -1)

    def __call__(self, h: jax.Array, modulation: jax.Array) -> jax.Array:
        """h [B, N, D], modulation [B, 2, D] -> [B, N, D]."""
        scale, shift = modulation[:, None, 0], modulation[:, None, 1]
        return (self.norm(h) * (1 + scale) + shift).astype(h.dtype)


class Block(nnx.Module):
    """One layer of the denoiser."""

    def __init__(self, config: DenoiserConfig, rngs: nnx.Rngs):
        dtype = attention.float_dtype(config.dtype)
        make_linear = functools.partial(nnx.Linear, kernel_init=normal(config), dtype=dtype)
        width, hidden = config.width, config.width * config.mlp_ratio
        make_attention = functools.partial(
            attention.Attention, num_heads=config.num_heads, make_linear=make_linear, rngs=rngs
        )
        self.norm_self = AdaLayerNorm(config, make_linear=make_linear, rngs=rngs)
        self.self_attention = make_attention(width, width)
        self.norm_cross = AdaLayerNorm(config, make_linear=make_linear, rngs=rngs)
        self.cross_attention = make_attention(width, config.text_width)
        self.norm_mlp = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.mlp_in = make_linear(width, hidden, rngs=rngs)
        self.mlp_out = make_linear(hidden, width, rngs=rngs)

    def modulations(self, time: jax.Array) -> jax.Array:
        """[..., 2 norms, 2, D] of times [...]."""
        norms = (self.norm_self, self.norm_cross)
        return jnp.stack([norm.modulation(time) for norm in norms], axis=-3)

    def __call__(self, h: jax.Array, extra) -> jax.Array:
        modulations, text = extra
        x = self.norm_self(h, modulations[:, 0])
        h = h + self.self_attention(x, self.self_attention.keys_values(x))
        x = self.norm_cross(h, modulations[:, 1])
        h = h + self.cross_attention(x, (text.keys, text.values))
        return h + self.mlp_out(attention.quick_gelu(self.mlp_in(self.norm_mlp(h))))


class Denoiser(nnx.Module):
    """Noisy tokens, time and text features -> logits of the clean codes."""

    def __init__(self, config: DenoiserConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = attention.float_dtype(config.dtype)
        rows, columns = config.grid
        embed = functools.partial(
            nnx.Embed, features=config.width, embedding_init=normal(config), dtype=dtype, rngs=rngs
        )
        self.code_embedding = embed(config.num_codes + 1)
        self.row_embedding = embed(rows)
        self.column_embedding = embed(columns)
        self.blocks = attention.stack_layers(
            lambda rngs: Block(config, rngs), config.num_layers, rngs
        )
        self.norm_out = nnx.LayerNorm(config.width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.to_logits = nnx.Linear(
            config.width, config.num_codes, kernel_init=normal(config), dtype=dtype, rngs=rngs
        )

    def modulations(self, time: jax.Array) -> jax.Array:
        """[layers, ..., 2, 2, D]: everything that depends on the times [...] in 1..T alone."""
        return attention.map_layers(self.blocks, lambda block: block.modulations(time))

    def text_context(self, text: jax.Array) -> TextContext:
        """Everything that depends on the text features [B, L, text_width] alone."""
        dtype = attention.float_dtype(self.config.dtype)
        return TextContext(
            *attention.map_layers(
                self.blocks,
                lambda block: block.cross_attention.keys_values(text.astype(dtype)),
            )
        )

    def denoise(self, tokens: jax.Array, modulations: jax.Array, context: TextContext) -> jax.Array:
        """Logits float32 [B, N, K] of tokens [B, N] in 0..K.

        Args:
          tokens: int32 [B, N].
          modulations: [layers, B, 2, 2, D] from ``modulations``.
          context: from ``text_context``, of B texts.
        """
        rows, columns = self.config.grid
        chex.assert_shape(tokens, (None, rows * columns))
        position = (
            self.row_embedding(jnp.arange(rows))[:, None]
            + (self.column_embedding(jnp.arange(columns))[None])
        )
        h = self.code_embedding(tokens) + position.reshape(1, rows * columns, -1)
        c = self.config
        h = attention.scan_layers(
            self.blocks, h, (modulations, context), c.remat, min(c.scan_unroll, c.num_layers)
        )
        return self.to_logits(self.norm_out(h)).astype(jnp.float32)

    def __call__(self, tokens: jax.Array, time: jax.Array, text: jax.Array) -> jax.Array:
        """Logits float32 [B, N, K]; tokens int32 [B, N], time int32 [B] in 1..T,
        text features [B, L, text_width]."""
        return self.denoise(tokens, self.modulations(time), self.text_context(text))
