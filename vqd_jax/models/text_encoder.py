"""A text encoder like CLIP's text tower: token ids -> a feature at every position.

It is a causal pre-norm transformer with quick-GELU and a final norm (Radford et al.,
arXiv:2103.00020).

Letters: B batch, L text positions, D width.
"""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from vqd_jax.errors import require_at_least, require_divisible
from vqd_jax.models import attention, functional, linear
from vqd_jax.models.attention import ONE_DEVICE, Placement


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of a text encoder.

    Attributes:
      vocab_size: number of token ids.
      context_length: L.
      width, num_layers, num_heads: D, number of blocks, number of heads.
      normalize: scale the feature of every position to length 1, as VQ-Diffusion does with the
        features of the pretrained tower.
      dtype: compute dtype, "float32" or "bfloat16".
      product_dtype: what the inputs of products with weights are rounded to; see ``linear``.
    """

    vocab_size: int
    context_length: int
    width: int
    num_layers: int
    num_heads: int
    normalize: bool = False
    dtype: str = "float32"
    product_dtype: str = "float32"

    def __post_init__(self):
        sizes = dict.fromkeys(("width", "num_layers", "num_heads"), 1)
        require_at_least(self, "text_encoder.", **sizes, vocab_size=3, context_length=3)
        require_divisible(self, "text_encoder.", width="num_heads")


class EncoderBlock(nnx.Module):
    """One layer of either tower of CLIP: pre-norm attention and MLP, both added to the stream.

    Args:
      config: has ``width``, ``num_layers``, ``num_heads``, ``dtype`` and ``product_dtype``.
      causal: no position attends to a later one.
      rngs: with a ``params`` stream.
      placement: of the activations on several devices.
    """

    def __init__(
        self, config: Any, *, causal: bool, rngs: nnx.Rngs, placement: Placement = ONE_DEVICE
    ):
        width, dtype = config.width, attention.float_dtype(config.dtype)
        normal = nnx.initializers.normal
        # Initial scales of the published tower: a branch of a deeper network starts smaller.
        make = linear.layer(dtype, config.product_dtype)
        make_linear = functools.partial(make, kernel_init=normal(width**-0.5))
        branch = normal((2 * width * config.num_layers) ** -0.5)
        self.causal = causal
        self.norm_attention = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.attention = attention.Attention(
            width,
            width,
            config.num_heads,
            make_linear=make_linear,
            rngs=rngs,
            placement=placement,
        )
        self.norm_mlp = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.mlp_in = make(width, 4 * width, kernel_init=normal((2 * width) ** -0.5), rngs=rngs)
        self.mlp_out = make(4 * width, width, kernel_init=branch, rngs=rngs)

    @jax.named_scope("text_encoder")
    def __call__(self, h: jax.Array, _: Any) -> jax.Array:
        x = self.norm_attention(h)
        h = h + self.attention(x, causal=self.causal)
        return h + self.mlp_out(attention.quick_gelu(self.mlp_in(self.norm_mlp(h))))


class TextEncoder(nnx.Module):
    """Token ids int32 [B, L] -> features [B, L, D]."""

    def __init__(
        self, config: TextEncoderConfig, *, rngs: nnx.Rngs, placement: Placement = ONE_DEVICE
    ):
        self.config = config
        self.placement = placement
        dtype, normal = attention.float_dtype(config.dtype), nnx.initializers.normal
        self.token_embedding = nnx.Embed(
            config.vocab_size, config.width, embedding_init=normal(0.02), dtype=dtype, rngs=rngs
        )
        self.position_embedding = nnx.Param(
            normal(0.01)(rngs.params(), (config.context_length, config.width))
        )
        self.blocks = attention.stack_layers(
            lambda rngs: EncoderBlock(config, causal=True, rngs=rngs, placement=placement),
            config.num_layers,
            rngs,
        )
        self.norm_out = nnx.LayerNorm(config.width, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """The states of all L positions after the final norm; nothing is pooled."""
        chex.assert_shape(ids, (None, self.config.context_length))
        h = self.token_embedding(ids)
        h = h + self.position_embedding[...].astype(h.dtype)[None]
        h = attention.scan_layers(self.blocks, h, None, placement=self.placement)
        h = self.norm_out(h)
        if self.config.normalize:
            h = h / jnp.linalg.norm(h.astype(jnp.float32), axis=-1, keepdims=True).astype(h.dtype)
        return h


abstract_params = functools.partial(functional.abstract, TextEncoder)
bind = functools.partial(functional.bind, TextEncoder)
