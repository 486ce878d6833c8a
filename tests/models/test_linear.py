"""The product of a linear layer, and its gradients, are those of jnp.matmul."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vqd_jax.models import linear


def _gradients(function, x, kernel, cotangent):
    value, back = jax.jit(lambda *a: jax.vjp(function, *a))(x, kernel)
    return value, *back(cotangent)


# Rows of 0 to 3 axes; kernels that are wider, narrower and square.
@pytest.mark.parametrize("rows", [(), (5,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("sizes", [(6, 10), (10, 6), (7, 7)])
def test_equals_matmul(rows, sizes):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(*rows, sizes[0])), rng.normal(size=sizes)
    cotangent = rng.normal(size=(*rows, sizes[1]))
    by_kernel = np.tensordot(x, cotangent, axes=(range(len(rows)), range(len(rows))))
    expected = x @ kernel, cotangent @ kernel.T, by_kernel
    found = _gradients(linear.product, *map(jnp.float32, (x, kernel, cotangent)))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_bfloat16_summed_in_float32():
    rng = np.random.default_rng(1)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((4, 300), (300, 5)))
    cotangent = jnp.ones((4, 5), jnp.float32)
    value, by_x, by_kernel = _gradients(
        lambda x, kernel: linear.product(x, kernel, jnp.float32), x, kernel, cotangent
    )
    assert (value.dtype, by_x.dtype, by_kernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    exact = np.float64(x) @ np.float64(kernel)
    np.testing.assert_allclose(value, exact, atol=1e-4)
    np.testing.assert_array_equal(by_kernel[:, 0], by_kernel[:, 4])


def test_rounded_products_are_summed_in_float32():
    rng = np.random.default_rng(2)
    sizes = (3, 40, 300), (300, 50), (3, 40, 50)
    x, kernel, cotangent = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes)
    found = _gradients(
        lambda x, kernel: linear.product(x, kernel, None, "bfloat16"), x, kernel, cotangent
    )
    a, b, c = (np.float64(y.astype(jnp.bfloat16)) for y in (x, kernel, cotangent))
    expected = a @ b, c @ b.T, np.tensordot(a, c, axes=((0, 1), (0, 1)))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    # Rounding is seen: without it the sums would be those of the inputs.
    assert np.abs(found[0] - np.float64(x) @ np.float64(kernel)).max() > 0.05


@pytest.mark.parametrize("has", [False, True])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_auto_rounds_on_a_cpu_with_such_products(monkeypatch, has, platform):
    monkeypatch.setattr(linear, "cpu_has_bfloat16", lambda: has)
    make = nnx.eval_shape(lambda: linear.layer(jnp.float32, "auto")(8, 4, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(make)

    def loss(params, x):
        return jnp.square(nnx.merge(graph, params)(x)).sum()

    traced = jax.jit(jax.grad(loss)).trace(params, jax.ShapeDtypeStruct((2, 8), jnp.float32))
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("bf16" in program) == (has and platform == "cpu")


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_other_platforms_multiply_bfloat16_numbers_as_they_are(platform):
    x, kernel = (jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in ((2, 8), (8, 4)))

    def program(product_dtype):
        def loss(x, kernel):
            return linear.product(x, kernel, None, product_dtype).sum()

        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, kernel)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    # Sums that are kept in float32 would be written and read once more.
    assert not re.search("dot_general.*xf32", program("auto"))
    assert program("auto") == program("float32") == program("bfloat16")


def test_layer_is_that_of_flax():
    ours, theirs = (make(6, 9, rngs=nnx.Rngs(0)) for make in (linear.layer(None), nnx.Linear))
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    np.testing.assert_array_equal(ours(x), theirs(x))

    def loss(layer):
        return jnp.square(layer(x)).sum()

    for a, b in zip(*(jax.tree.leaves(nnx.grad(loss)(m)) for m in (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
