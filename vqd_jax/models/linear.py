"""Linear layers that are fast on a CPU: their gradients, and products of bfloat16 numbers.

The gradient of a kernel contracts the rows of the inputs with those of the output's gradient. XLA
for CPUs has its fast products for inputs that are contracted along their last axis, and takes
another, slower one here. So on a CPU the inputs are transposed first. The barrier keeps XLA from
folding the transposition back into the product.

Some processors multiply bfloat16 numbers, and sum them in float32, several times faster than
float32 numbers. XLA uses those instructions for inputs in bfloat16 whose product is asked for in
float32, and for no other. So a float32 layer may round the inputs of its products
(``product_dtype``), and a bfloat16 layer rounds the sum only afterwards.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# What float32 inputs of a product are rounded to, by the name used in configs. "auto" is "bfloat16"
# on a CPU that is made for it, and "float32" elsewhere.
PRODUCT_DTYPES = ("auto", "float32", "bfloat16")


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether this machine's processor has products of bfloat16 numbers (AVX512-BF16 or AMX)."""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(words)


def rounds(product_dtype: str, platform: str) -> bool:
    """Whether float32 inputs of products are rounded to bfloat16 on a platform such as "cpu"."""
    if product_dtype == "auto":
        return platform == "cpu" and cpu_has_bfloat16()
    return product_dtype == "bfloat16"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(
    x: jax.Array, kernel: jax.Array, out_dtype: Any = None, product_dtype: str = "float32"
) -> jax.Array:
    """x [..., I] and kernel [I, O] of one dtype -> [..., O].

    Inside of the gradient, both inputs of a product have the dtype of ``x``, or the narrower one.

    Args:
      x, kernel: the inputs.
      out_dtype: of the result; None is that of ``x``.
      product_dtype: what float32 inputs of this product, and of those of its gradient, are rounded
        to; one of ``PRODUCT_DTYPES``.
    """
    out_dtype = out_dtype or x.dtype

    def summed_in_float32(x, kernel, rounded):
        return _dot(x, kernel, ((x.ndim - 1,), (0,)), rounded).astype(out_dtype)

    def elsewhere(x, kernel):
        if product_dtype == "bfloat16" and x.dtype == jnp.float32:
            return summed_in_float32(x, kernel, rounded=True)
        return jnp.matmul(x, kernel, preferred_element_type=out_dtype)

    on_cpu = functools.partial(summed_in_float32, rounded=rounds(product_dtype, "cpu"))
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=elsewhere)


def _dot(a: jax.Array, b: jax.Array, axes: tuple, rounded: bool) -> jax.Array:
    """Contracts the axes of ``a`` with those of ``b``; the sums are float32."""
    if rounded:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)


def _forward(x, kernel, out_dtype, product_dtype):
    return product(x, kernel, out_dtype, product_dtype), (x, kernel)


def _backward(out_dtype, product_dtype, kept, gradient):
    x, kernel = kept
    gradient = gradient.astype(x.dtype)

    def summed_in_float32(x, kernel, gradient, rounded):
        by_x = _dot(gradient, kernel, ((x.ndim - 1,), (1,)), rounded)
        # A transposition is slow as well, so it is that of the narrower one.
        narrow, wide = (x, gradient) if kernel.shape[0] <= kernel.shape[1] else (gradient, x)
        turned = jax.lax.optimization_barrier(jnp.moveaxis(narrow, -1, 0))
        rows = range(x.ndim - 1)
        by_kernel = _dot(turned, wide, (tuple(i + 1 for i in rows), tuple(rows)), rounded)
        if narrow is not x:
            by_kernel = jax.lax.optimization_barrier(by_kernel).T
        return by_x.astype(x.dtype), by_kernel.astype(x.dtype)

    def elsewhere(x, kernel, gradient):
        if product_dtype == "bfloat16" and x.dtype == jnp.float32:
            return summed_in_float32(x, kernel, gradient, rounded=True)
        return jax.vjp(jnp.matmul, x, kernel)[1](gradient)

    on_cpu = functools.partial(summed_in_float32, rounded=rounds(product_dtype, "cpu"))
    return jax.lax.platform_dependent(x, kernel, gradient, cpu=on_cpu, default=elsewhere)


product.defvjp(_forward, _backward)


@functools.cache
def _dot_general(product_dtype: str) -> Callable:
    # Cached, since layers of one kind must have one function: it is a part of what they are.
    def dot_general(x, kernel, *_, **options):
        # As ``nnx.Linear`` calls it: the last axis of x and the first of the kernel.
        return product(x, kernel, None, product_dtype)

    return dot_general


def layer(dtype: Any, product_dtype: str = "float32") -> Callable[..., nnx.Linear]:
    """Makes ``nnx.Linear`` layers.

    Args:
      dtype: compute dtype.
      product_dtype: see ``product``.
    """
    return functools.partial(nnx.Linear, dtype=dtype, dot_general=_dot_general(product_dtype))
