"""Linear layers whose kernel gradient is fast on a CPU.

The gradient of a kernel contracts the rows of the inputs with those of the output's gradient. XLA
for CPUs has its fast products for inputs that are contracted along their last axis, and takes
another, slower one here. So on a CPU the inputs are transposed first. The barrier keeps XLA from
folding the transposition back into the product.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel: jax.Array, out_dtype: Any = None) -> jax.Array:
    """x [..., I] and kernel [I, O] of one dtype -> [..., O], in ``out_dtype`` if it is given.

    Inside of the gradient, both inputs of a product have the dtype of ``x``.
    """
    return jnp.matmul(x, kernel, preferred_element_type=out_dtype)


def _forward(x, kernel, out_dtype):
    return product(x, kernel, out_dtype), (x, kernel)


def _backward(out_dtype, kept, gradient):
    x, kernel = kept
    gradient = gradient.astype(x.dtype)

    def rows_last(x, kernel, gradient):
        # A transposition is slow as well, so it is that of the narrower one.
        narrow, wide = (x, gradient) if kernel.shape[0] <= kernel.shape[1] else (gradient, x)
        turned = jax.lax.optimization_barrier(jnp.moveaxis(narrow, -1, 0))
        made = jnp.tensordot(turned, wide, axes=x.ndim - 1)
        return made if narrow is x else jax.lax.optimization_barrier(made).T

    def plain(x, kernel, gradient):
        return jax.vjp(functools.partial(jnp.matmul, x), kernel)[1](gradient)[0]

    by_x = jax.vjp(lambda x: jnp.matmul(x, kernel), x)[1](gradient)[0]
    return by_x, jax.lax.platform_dependent(x, kernel, gradient, cpu=rows_last, default=plain)


product.defvjp(_forward, _backward)


def _dot_general(x, kernel, dimension_numbers, precision=None, **options):
    # As ``nnx.Linear`` calls it: the last axis of x and the first of the kernel.
    del dimension_numbers, precision, options
    return product(x, kernel)


Linear = functools.partial(nnx.Linear, dot_general=_dot_general)
