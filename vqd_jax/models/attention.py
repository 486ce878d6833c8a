"""Multi-head attention, its backend, and the scanned stack of layers of all transformers here.

Letters: B batch, N queries, M keys, D width, H heads.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

_PRODUCT = "product"


def product(x: jax.Array) -> jax.Array:
    """Marks ``x``, a matrix product with its bias, as what ``remat`` "dots" keeps.

    Were the product kept without its bias, XLA could not add the bias in the product's kernel.
    """
    return checkpoint_name(x, _PRODUCT)


def _keeps_products(primitive, *args, **params) -> bool:
    # What the backward pass of cuDNN's attention reads has no name, so its primitive is asked for.
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

# Compute dtypes, by the name used in configs.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# Above this many bytes of scores, a CPU computes one head at a time, which stays in its cache.
_MOST_SCORES = 2**24


def _unconstrained(x: jax.Array, heads_axis: int) -> jax.Array:
    return x


class Placement(NamedTuple):
    """What a model is told of the devices that its program is made for; the default is one device.

    On several devices the rows of a batch stay apart: the models mark the stream between their
    layers. Without the marks, the partitioner may divide activations along their width, as the
    parameters are, and then exchanges activations instead of parameters.

    Attributes:
      constrain: (x [B, ...], axis of the heads or 0) -> x with its rows, and its heads, on the
        devices that should hold them.
      compute_capability: of the GPUs (see the function); None asks the first device of this
        machine. A program may be compiled for devices of another machine.
    """

    constrain: Callable[[jax.Array, int], jax.Array] = _unconstrained
    compute_capability: float | None = None

    def rows(self, x: jax.Array) -> jax.Array:
        """``x`` [B, ...] with its rows in their place."""
        return self.constrain(x, 0)

    def heads(self, x: jax.Array) -> jax.Array:
        """``x`` [B, N, H, D/H] with its rows and its heads in their place."""
        return self.constrain(x, 2)


ONE_DEVICE = Placement()


def compute_capability(device: jax.Device) -> float:
    """That of an NVIDIA GPU, such as 9.0 for an H100; 0 for any other device."""
    found = str(getattr(device, "compute_capability", ""))
    # Those of AMD have names such as gfx942.
    return float(found) if device.platform == "gpu" and found[:1].isdigit() else 0.0


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    placement: Placement = ONE_DEVICE,
) -> jax.Array:
    """softmax(q k^T / sqrt(D/H)) v; q [B, N, H, D/H], k and v [B, M, H, D/H] -> like q.

    The backend is chosen here and nowhere else: cuDNN's fused kernel on a GPU that has one; matrix
    products of single heads on a CPU, unless a gradient is needed; XLA's attention otherwise. The
    softmax is in float32.
    """
    capability = placement.compute_capability
    if capability is None:
        capability = compute_capability(jax.local_devices()[0])
    if cudnn_applies(q.dtype, q.shape[-1], capability):
        # cuDNN's partitioning wants all three divided over the devices in the same way.
        q, k, v = map(placement.heads, (q, k, v))
        return attend_padded(q, k, v, causal=causal)
    return _attend_with_xla(q, k, v, is_causal=True) if causal else _attend(q, k, v)


_attend_with_xla = functools.partial(jax.nn.dot_product_attention, implementation="xla")


@jax.custom_jvp
def _attend(q, k, v):
    # The platform is known when the program is lowered, which may be for another machine.
    return jax.lax.platform_dependent(q, k, v, cpu=_attend_by_heads, default=_attend_with_xla)


@_attend.defjvp
def _attend_jvp(primals, tangents):
    return jax.jvp(_attend_with_xla, primals, tangents)


def attend_padded(q, k, v, *, causal: bool = False, implementation: str = "cudnn") -> jax.Array:
    """``attend`` with shapes that cuDNN takes: N and M even, D/H a multiple of 8.

    cuDNN refuses the gradient for odd lengths (CLIP has 77 positions), and heads of VQ-Diffusion-S
    are 12 wide. Zeros are added; the lengths tell the kernel which keys to leave out.
    """
    batch, num_queries, _, width = q.shape
    lengths = {}
    if num_queries % 2 or k.shape[1] % 2:
        lengths["query_seq_lengths"] = jnp.full(batch, num_queries, jnp.int32)
        lengths["key_value_seq_lengths"] = jnp.full(batch, k.shape[1], jnp.int32)

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, -width % 8)))

    out = jax.nn.dot_product_attention(
        padded(q),
        padded(k),
        padded(v),
        scale=width**-0.5,
        is_causal=causal,
        implementation=implementation,
        **lengths,
    )
    return out[:, :num_queries, :, :width]


def _attend_by_heads(q, k, v):
    """``attend`` as one matrix product for each head, which a CPU computes several times faster."""

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
    """Whether cuDNN has a kernel for this dtype and D/H on a GPU; JAX raises where it has none."""
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
        self,
        width: int,
        context_width: int,
        num_heads: int,
        *,
        make_linear: Callable,
        rngs: nnx.Rngs,
        placement: Placement = ONE_DEVICE,
    ):
        self.num_heads = num_heads
        self.placement = placement
        self.query = make_linear(width, width, rngs=rngs)
        self.key = make_linear(context_width, width, rngs=rngs)
        self.value = make_linear(context_width, width, rngs=rngs)
        self.proj = make_linear(width, width, rngs=rngs)

    def keys_values(self, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, M, H, D/H] of a context [B, M, context_width]."""
        keys, values = self.key(context), self.value(context)
        return split_heads(keys, self.num_heads), split_heads(values, self.num_heads)

    def __call__(self, x: jax.Array, keys_values=None, *, causal: bool = False) -> jax.Array:
        """[B, N, D] attends to ``keys_values``, or without them to itself -> [B, N, D]."""
        if keys_values is None:
            keys_values = [product(y) for y in self.keys_values(x)]
        q = split_heads(product(self.query(x)), self.num_heads)
        mixed = attend(q, *keys_values, causal=causal, placement=self.placement)
        return product(self.proj(merge_heads(mixed)))


def stack_layers(make_layer: Callable, num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """``num_layers`` independent layers; their parameters have a leading layer axis."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return make_layer(rngs)

    return make(rngs)


def scan_layers(
    layers: nnx.Module,
    x: jax.Array,
    extras,
    remat: str = "none",
    unroll: int = 1,
    placement: Placement = ONE_DEVICE,
) -> jax.Array:
    """x <- layer(x, extra) for every layer; ``extras`` is a pytree with a leading layer axis.

    ``remat`` is a key of ``REMAT_POLICIES``; one turn of the loop computes ``unroll`` layers.
    """
    graphdef, params = nnx.split(layers)

    def body(x, layer):
        layer_params, extra = layer
        return placement.rows(nnx.merge(graphdef, layer_params)(x, extra)), None

    if remat != "none":
        # XLA would merge what is computed again with the first time, but not across two loops.
        in_a_loop = unroll < jax.tree.leaves(params)[0].shape[0]
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=not in_a_loop)
    return jax.lax.scan(body, placement.rows(x), (params, extras), unroll=unroll)[0]


def map_layers(layers: nnx.Module, method: Callable, placement: Placement = ONE_DEVICE):
    """``method(layer)`` for every layer at once; results get a leading layer axis."""
    graphdef, params = nnx.split(layers)

    def of_layer(layer_params):
        return jax.tree.map(placement.rows, method(nnx.merge(graphdef, layer_params)))

    return jax.vmap(of_layer)(params)


def float_dtype(name: str) -> jnp.dtype:
    """The compute dtype that a config names."""
    return jnp.dtype(DTYPES[name])
