"""Multi-head attention and the scanned stack of layers that the transformers here share.

Letters: B batch, N queries, M keys, D width, H heads.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vqd_jax.models import placement

_PRODUCT = "product"


def product(x: jax.Array) -> jax.Array:
    """Marks ``x`` as what ``remat`` "dots" keeps: a matrix product, its bias added.

    To keep what is before the bias would part the sum from the kernel of the product.
    """
    return checkpoint_name(x, _PRODUCT)


def _keeps_products(primitive, *args, **params) -> bool:
    # Of cuDNN's attention what its backward pass reads has no name.
    named = jax.checkpoint_policies.save_only_these_names(_PRODUCT)
    return primitive.name.startswith("dot_product_attention_fwd") or named(
        primitive, *args, **params
    )


# What a layer keeps for the backward pass, by the name used in configs.
REMAT_POLICIES = {
    "none": None,
    "dots": _keeps_products,
    "full": jax.checkpoint_policies.nothing_saveable,
}

# Scores of this many bytes are not kept at once on a CPU: one head at a time stays in its cache.
_MOST_SCORES = 2**24


def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(D/H)) v; q [B, N, H, D/H], k and v [B, M, H, D/H] -> like q.

    The softmax is in float32. On a GPU that can, it is one fused kernel of cuDNN; on a CPU, where
    no gradient is asked for, one head follows another.
    """
    cudnn = cudnn_applies(q.dtype, q.shape[-1], placement.compute_capability())
    if causal:
        return _attend_at_once(q, k, v, cudnn, causal=True)
    return _attend(q, k, v, cudnn)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _attend(q, k, v, cudnn):
    # Decided when the program is lowered, which may be for another machine than this one.
    at_once = functools.partial(_attend_at_once, cudnn=cudnn)
    return jax.lax.platform_dependent(q, k, v, cpu=_attend_by_heads, default=at_once)


@_attend.defjvp
def _attend_jvp(cudnn, primals, tangents):
    return jax.jvp(functools.partial(_attend_at_once, cudnn=cudnn), primals, tangents)


def _attend_at_once(q, k, v, cudnn, causal=False):
    if cudnn:
        # It takes the three divided alike over the devices, or not at all.
        q, k, v = map(placement.heads, (q, k, v))
        return attend_padded(q, k, v, causal=causal, implementation="cudnn")
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="xla")


def attend_padded(q, k, v, *, causal: bool = False, implementation: str = "cudnn") -> jax.Array:
    """``attend`` with shapes that cuDNN takes: N and M even, D/H a multiple of 8.

    The gradient of cuDNN's kernel is refused for odd lengths (CLIP has 77 positions), and heads of
    VQ-Diffusion-S are 12 wide. Zeros are added and, of keys, left out by their number.
    """
    batch, num_queries, _, width = q.shape
    lengths = {}
    if num_queries % 2 or k.shape[1] % 2:
        lengths["query_seq_lengths"] = jnp.full(batch, num_queries, jnp.int32)
        lengths["key_value_seq_lengths"] = jnp.full(batch, k.shape[1], jnp.int32)

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, -width % 8)))

    out = jax.nn.dot_product_attention(
        padded(q), padded(k), padded(v), scale=width**-0.5, is_causal=causal,
        implementation=implementation, **lengths,
    )  # fmt: skip
    return out[:, :num_queries, :, :width]


def _attend_by_heads(q, k, v):
    """``attend`` as matrix products, which a CPU does many times faster than strided ones."""

    def one_head(qkv):
        q, k, v = qkv  # [N, D/H], [M, D/H], [M, D/H]
        scores = jnp.matmul(q, k.T, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        p = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        total = p.sum(axis=-1, keepdims=True)
        out = jnp.matmul(p.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / total).astype(q.dtype)

    batch, num_queries, num_heads, width = q.shape
    heads = [x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1], width) for x in (q, k, v)]
    num_bytes = 4 * batch * num_heads * num_queries * k.shape[1]
    over_heads = jax.lax.map if num_bytes > _MOST_SCORES else lambda f, x: jax.vmap(f)(x)
    out = over_heads(one_head, tuple(heads))
    return out.reshape(batch, num_heads, num_queries, width).transpose(0, 2, 1, 3)


def cudnn_applies(dtype: jnp.dtype, head_width: int, capability: float) -> bool:
    """Whether cuDNN has a kernel for this dtype and D/H on a GPU; capability 0 is no GPU.

    It raises where it has none, so that the question is asked before.
    """
    return capability >= 8.0 and dtype in (jnp.bfloat16, jnp.float16) and head_width <= 128


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """[..., D] -> [..., H, D/H]."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def merge_heads(x: jax.Array) -> jax.Array:
    """[..., H, D/H] -> [..., D]."""
    return x.reshape(*x.shape[:-2], -1)


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), the activation of CLIP and of VQ-Diffusion."""
    return x * jax.nn.sigmoid(1.702 * x)


class Attention(nnx.Module):
    """Attention with separate query, key, value and output projections, all with bias."""

    def __init__(
        self, width: int, context_width: int, num_heads: int, *, make_linear: Callable, rngs
    ):
        self.num_heads = num_heads
        self.query = make_linear(width, width, rngs=rngs)
        self.key = make_linear(context_width, width, rngs=rngs)
        self.value = make_linear(context_width, width, rngs=rngs)
        self.proj = make_linear(width, width, rngs=rngs)

    def keys_values(self, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, M, H, D/H] of a context [B, M, context_width]."""
        split = lambda x: split_heads(product(x), self.num_heads)  # noqa: E731
        return split(self.key(context)), split(self.value(context))

    def __call__(self, x: jax.Array, keys_values, *, causal: bool = False) -> jax.Array:
        """[B, N, D] attends to ``keys_values`` and comes back as [B, N, D]."""
        q = split_heads(product(self.query(x)), self.num_heads)
        return product(self.proj(merge_heads(attend(q, *keys_values, causal=causal))))


def stack_layers(make_layer: Callable, num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """``num_layers`` independent layers; their parameters have a leading layer axis."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return make_layer(rngs)

    return make(rngs)


def scan_layers(
    layers: nnx.Module, x: jax.Array, extras, remat: str = "none", unroll: int = 1
) -> jax.Array:
    """x <- layer(x, extra) for every layer; ``extras`` is a pytree with a leading layer axis.

    ``remat`` is a key of ``REMAT_POLICIES``; ``unroll`` layers make up one turn of the loop.
    """
    graphdef, params = nnx.split(layers)

    def body(x, layer):
        layer_params, extra = layer
        return placement.rows(nnx.merge(graphdef, layer_params)(x, extra)), None

    if remat != "none":
        # Between the two passes of a loop there is nothing to share; without one there is.
        alone = unroll < jax.tree.leaves(params)[0].shape[0]
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=not alone)
    return jax.lax.scan(body, placement.rows(x), (params, extras), unroll=unroll)[0]


def map_layers(layers: nnx.Module, method: Callable):
    """``method(layer)`` for every layer at once; results get a leading layer axis."""
    graphdef, params = nnx.split(layers)

    def of_layer(layer_params):
        return jax.tree.map(placement.rows, method(nnx.merge(graphdef, layer_params)))

    return jax.vmap(of_layer)(params)


def float_dtype(name: str) -> jnp.dtype:
    """The compute dtype that a config names."""
    return jnp.dtype({"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name])
