"""The denoiser of VQ-Diffusion: a transformer that predicts clean codes from noisy tokens.

Every block has self-attention, cross-attention to all text positions and an MLP. Each of them reads
the normalised stream, and its output is added to the stream. The norms before the attentions are
AdaLN: scale and shift come from a learned embedding of the time, and every norm has its own table
(section 4.3 of arXiv:2111.14822; "AdaLayerNorm" in the published code). A class-conditional block
has no cross-attention; the class enters through the norm before the MLP, which is AdaLN, too. An
unconditional block has neither.

Letters: B batch, N image tokens, L text positions, D width, K codes, H heads, T steps, C classes.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from vqd_jax.errors import require_at_least, require_choice, require_divisible
from vqd_jax.models import attention, linear
from vqd_jax.models.attention import ONE_DEVICE, Placement

CONDITIONS = ("text", "class", "none")


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """Sizes of a denoiser.

    Attributes:
      num_codes: K; the mask token is one more input id, but never an output.
      grid: rows and columns of the token grid, N = rows * columns.
      num_steps: T, rows of every time table.
      width, num_layers, num_heads: D, number of blocks, H.
      condition: "text", "class" or "none".
      text_width: width of the text features, if the condition is a text.
      num_classes: C, if the condition is a class; label C is the null class.
      learned_null: whether the class tables have a row for the null class. Without one, the mean of
        all rows is used, as published for the guidance of models that were trained without it.
      mlp: "fc", or "conv" for two 3x3 convolutions over the grid.
      mlp_ratio: hidden width of the MLP divided by D.
      position_table: rows and columns of the position tables; None is ``grid``. If they are larger
        than the grid, the sum of the two tables is flattened and cut to N entries, as published:
        token i of the 16x16 grid of the ImageNet model has row i // 32 and column i % 32.
      remat: key of ``attention.REMAT_POLICIES``.
      scan_unroll: layers in one turn of the loop over layers. More of them compute faster on a CPU,
        and all of them on a GPU, but compile more slowly.
      init_std: standard deviation of the initial weights. The published code has 0.02; narrow
        networks learn faster from larger weights.
      dtype: compute dtype, "float32" or "bfloat16"; parameters are float32.
      product_dtype: what the inputs of products with weights are rounded to: "float32", "bfloat16",
        or "auto", which is bfloat16 on a CPU with instructions for it and float32 elsewhere.
    """

    num_codes: int
    grid: tuple[int, int]
    num_steps: int
    width: int
    num_layers: int
    num_heads: int
    condition: str = "text"
    text_width: int = 0
    num_classes: int = 0
    learned_null: bool = False
    mlp: str = "fc"
    mlp_ratio: int = 4
    position_table: tuple[int, int] | None = None
    remat: str = "none"
    scan_unroll: int = 1
    init_std: float = 0.02
    dtype: str = "float32"
    product_dtype: str = "float32"

    def __post_init__(self):
        sizes = dict.fromkeys(("width", "num_layers", "num_heads", "mlp_ratio", "scan_unroll"), 1)
        require_at_least(self, "denoiser.", **sizes, num_classes=0)
        if not 0 < self.init_std < math.inf:
            raise ValueError(f"denoiser.init_std={self.init_std}: must be positive")
        require_divisible(self, "denoiser.", width="num_heads")
        of_model = {"condition": CONDITIONS, "mlp": ("fc", "conv")}
        of_program = {"remat": attention.REMAT_POLICIES, "dtype": attention.DTYPES}
        of_program["product_dtype"] = linear.PRODUCT_DTYPES
        require_choice(self, "denoiser.", **of_model, **of_program)
        if self.condition == "text" and self.text_width < 1:
            raise ValueError(f"denoiser.text_width={self.text_width}: must be positive")
        if (self.condition == "class") != (self.num_classes > 0):
            raise ValueError(
                f"denoiser.num_classes={self.num_classes} with denoiser.condition="
                f"{self.condition!r}: a class model has classes, and no other model has any"
            )
        if math.prod(self.positions) < math.prod(self.grid):
            raise ValueError(
                f"denoiser.position_table={self.positions} is smaller than the grid {self.grid}"
            )

    @property
    def positions(self) -> tuple[int, int]:
        """Rows and columns of the position tables."""
        return self.position_table or self.grid


def normal(config: DenoiserConfig):
    """The initializer of every weight matrix and embedding."""
    return nnx.initializers.normal(config.init_std)


class TextContext(NamedTuple):
    """Keys and values of every layer's cross-attention, each [layers, B, L, H, D/H]."""

    keys: jax.Array
    values: jax.Array


class AdaLayerNorm(nnx.Module):
    """LN(h) (1 + scale) + shift, where scale and shift come from a learned embedding.

    Args:
      config: sizes.
      num_rows: rows of the embedding table: one for each time, or for each class.
      make_linear: makes a linear layer in the compute dtype.
      rngs: with a ``params`` stream.
    """

    def __init__(self, config: DenoiserConfig, num_rows: int, *, make_linear, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(
            config.width, epsilon=1e-5, use_bias=False, use_scale=False, rngs=rngs
        )
        self.embedding = nnx.Embed(num_rows, config.width, embedding_init=normal(config), rngs=rngs)
        self.linear = make_linear(config.width, 2 * config.width, rngs=rngs)

    def modulation(self, time: jax.Array) -> jax.Array:
        """Times [...] in 1..T -> (scale, shift) [..., 2, D]."""
        scale_shift = self.linear(jax.nn.silu(self.embedding(time - 1)))
        return scale_shift.reshape(*time.shape, 2, -1)

    def class_modulation(self, labels: jax.Array) -> jax.Array:
        """Labels [B] -> (scale, shift) [B, 2, D]; a label past the table's end has the mean row."""
        table = self.embedding.embedding[...]
        known = labels[:, None] < table.shape[0]
        row = jnp.where(known, self.embedding(labels), table.mean(0, keepdims=True))
        return self.linear(jax.nn.silu(row)).reshape(*labels.shape, 2, -1)

    def __call__(self, h: jax.Array, modulation: jax.Array) -> jax.Array:
        """h [B, N, D], modulation [B, 2, D] -> [B, N, D]."""
        scale, shift = modulation[:, None, 0], modulation[:, None, 1]
        return (self.norm(h) * (1 + scale) + shift).astype(h.dtype)


class Block(nnx.Module):
    """One layer of the denoiser."""

    def __init__(
        self, config: DenoiserConfig, *, rngs: nnx.Rngs, placement: Placement = ONE_DEVICE
    ):
        dtype = attention.float_dtype(config.dtype)
        make = linear.layer(dtype, config.product_dtype)
        make_linear = functools.partial(make, kernel_init=normal(config))
        width, hidden = config.width, config.width * config.mlp_ratio
        make_attention = functools.partial(
            attention.Attention,
            num_heads=config.num_heads,
            make_linear=make_linear,
            rngs=rngs,
            placement=placement,
        )
        make_norm = functools.partial(AdaLayerNorm, config, make_linear=make_linear, rngs=rngs)
        self.condition = config.condition
        self.norm_self = make_norm(config.num_steps)
        self.self_attention = make_attention(width, width)
        if config.condition == "text":
            self.norm_cross = make_norm(config.num_steps)
            self.cross_attention = make_attention(width, config.text_width)
        if config.condition == "class":
            self.norm_mlp = make_norm(config.num_classes + config.learned_null)
        else:
            self.norm_mlp = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        make_mlp = make_linear
        if config.mlp == "conv":
            # Published initial weights: uniform within 1 / sqrt(fan-in).
            kernel = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            make_mlp = functools.partial(
                nnx.Conv, kernel_size=(3, 3), padding=1, kernel_init=kernel, dtype=dtype
            )
        self.grid = config.grid if config.mlp == "conv" else None
        self.mlp_in = make_mlp(width, hidden, rngs=rngs)
        self.mlp_out = make_mlp(hidden, width, rngs=rngs)

    def modulations(self, time: jax.Array) -> jax.Array:
        """Times [...] -> (scale, shift) [..., norms, 2, D]; two norms with a text, else one."""
        norms = [self.norm_self]
        if self.condition == "text":
            norms.append(self.norm_cross)
        return jnp.stack([norm.modulation(time) for norm in norms], axis=-3)

    def context(self, condition: jax.Array) -> jax.Array | TextContext:
        """What the layer needs of text features [B, L, text_width], or of labels [B]."""
        if self.condition == "class":
            return self.norm_mlp.class_modulation(condition)
        return TextContext(*self.cross_attention.keys_values(condition))

    def __call__(self, h: jax.Array, extra) -> jax.Array:
        modulations, context = extra
        x = self.norm_self(h, modulations[:, 0])
        h = h + self.self_attention(x)
        if self.condition == "text":
            x = self.norm_cross(h, modulations[:, 1])
            h = h + self.cross_attention(x, context)
        x = self.norm_mlp(h, context) if self.condition == "class" else self.norm_mlp(h)
        return h + self._mlp(x)

    def _mlp(self, x):
        """[B, N, D] -> [B, N, D]; convolutions see the tokens as a grid."""
        image = x if self.grid is None else x.reshape(x.shape[0], *self.grid, x.shape[-1])
        hidden = attention.product(self.mlp_in(image))
        return self.mlp_out(attention.quick_gelu(hidden)).reshape(x.shape)


class Denoiser(nnx.Module):
    """Noisy tokens, time and condition -> logits of the clean codes.

    Args:
      config: sizes.
      rngs: with a ``params`` stream.
      placement: of the activations on several devices.
    """

    def __init__(
        self, config: DenoiserConfig, *, rngs: nnx.Rngs, placement: Placement = ONE_DEVICE
    ):
        self.config = config
        self.placement = placement
        dtype = attention.float_dtype(config.dtype)
        rows, columns = config.positions
        embed = functools.partial(
            nnx.Embed, features=config.width, embedding_init=normal(config), dtype=dtype, rngs=rngs
        )
        self.code_embedding = embed(config.num_codes + 1)
        self.row_embedding = embed(rows)
        self.column_embedding = embed(columns)
        self.blocks = attention.stack_layers(
            lambda rngs: Block(config, rngs=rngs, placement=placement), config.num_layers, rngs
        )
        self.norm_out = nnx.LayerNorm(config.width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.to_logits = nnx.Linear(
            config.width, config.num_codes, kernel_init=normal(config), dtype=dtype, rngs=rngs
        )

    @jax.named_scope("denoiser")
    def modulations(self, time: jax.Array) -> jax.Array:
        """All that depends only on the times [...] in 1..T: [layers, ..., norms, 2, D]."""
        return self._of_layers(lambda block: block.modulations(time))

    @jax.named_scope("denoiser")
    def context(self, condition: jax.Array | None) -> TextContext | jax.Array | None:
        """All that depends only on the condition.

        Args:
          condition: text features [B, L, text_width], labels int32 [B] in 0..C, or None, depending
            on ``config.condition``.

        Returns:
          Keys and values of the text, or (scale, shift) [layers, B, 2, D] of the labels, or None.
        """
        if self.config.condition == "none":
            return None
        if self.config.condition == "text":
            condition = condition.astype(attention.float_dtype(self.config.dtype))
        return self._of_layers(lambda block: block.context(condition))

    def _of_layers(self, method):
        return attention.map_layers(self.blocks, method, self.placement)

    def positions(self) -> jax.Array:
        """[1, N, D]: row plus column embedding of every token."""
        rows, columns = self.config.positions
        table = self.row_embedding(jnp.arange(rows))[:, None]
        table = table + self.column_embedding(jnp.arange(columns))[None]
        return table.reshape(1, rows * columns, -1)[:, : math.prod(self.config.grid)]

    @jax.named_scope("denoiser")
    def denoise(
        self,
        tokens: jax.Array,
        modulations: jax.Array,
        context: TextContext | jax.Array | None,
    ) -> jax.Array:
        """Logits float32 [B, N, K] of the clean codes.

        Args:
          tokens: int32 [B, N] in 0..K.
          modulations: [layers, B, norms, 2, D] from ``modulations``.
          context: of B conditions, from ``context``.
        """
        chex.assert_shape(tokens, (None, math.prod(self.config.grid)))
        h = self.code_embedding(tokens) + self.positions()
        c = self.config
        unroll = min(c.scan_unroll, c.num_layers)
        h = attention.scan_layers(
            self.blocks, h, (modulations, context), c.remat, unroll, self.placement
        )
        return self.placement.rows(self.logits(self.norm_out(h)))

    def logits(self, h: jax.Array) -> jax.Array:
        """The normalised stream [B, N, D], in the compute dtype -> logits float32 [B, N, K].

        Products are summed in float32: guidance multiplies the difference of two logits, and with
        it their rounding errors.
        """
        kernel, bias = self.to_logits.kernel[...], self.to_logits.bias[...]
        rounding = self.config.product_dtype
        made = linear.product(h, kernel.astype(h.dtype), jnp.float32, rounding)
        return made + bias[None, None]

    def __call__(
        self, tokens: jax.Array, time: jax.Array, condition: jax.Array | None = None
    ) -> jax.Array:
        """Logits float32 [B, N, K] of the clean codes.

        Args:
          tokens: int32 [B, N] in 0..K.
          time: int32 [B] in 1..T.
          condition: as for ``context``.
        """
        return self.denoise(tokens, self.modulations(time), self.context(condition))
