"""Convolutions that are written out for a CPU equal plain ones; the normalisation equals Flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vqd_jax.models import convolution
from vqd_jax.models.convolution import GroupNorm

jax.config.update("jax_numpy_rank_promotion", "raise")


def _plain(x, kernel, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _same(ours, theirs, *arguments):
    """Values, and gradients by all arguments under one cotangent."""
    expected, back = jax.vjp(theirs, *arguments)
    found, ours_back = jax.jit(lambda *a: jax.vjp(ours, *a)[0])(*arguments), None
    cotangent = np.random.default_rng(9).normal(size=expected.shape).astype(np.float32)
    ours_back = jax.jit(lambda *a: jax.vjp(ours, *a)[1](cotangent))(*arguments)
    for a, b in zip((found, *ours_back), (expected, *back(cotangent)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("channels", [(3, 8), (8, 3), (1, 1), (5, 6)])
@pytest.mark.parametrize("side, padding", [(3, ((1, 1), (1, 1))), (4, ((1, 2), (0, 1)))])
def test_few_channels(channels, side, padding):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 6, channels[0])).astype(np.float32)
    kernel = rng.normal(size=(side, side, *channels)).astype(np.float32)
    _same(
        lambda x, k: convolution.conv(x, k, padding=padding),
        lambda x, k: _plain(x, k, padding),
        x,
        kernel,
    )


@pytest.mark.parametrize(
    "shape, side, stride, padding",
    [
        ((2, 7, 6, 24), 3, 1, ((1, 1), (1, 1))),
        ((2, 8, 7, 24), 4, 2, ((1, 2), (0, 1))),
        # More pixels than one block has: rows of one image after the other.
        ((3, 96, 40, 24), 3, 1, ((1, 1), (1, 1))),
        ((3, 131, 160, 24), 3, 2, ((0, 1), (0, 1))),
    ],
)
def test_many_channels(shape, side, stride, padding):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    kernel = rng.normal(size=(side, side, 24, 32)).astype(np.float32)
    _same(
        lambda x, k: convolution.conv(x, k, stride=stride, padding=padding),
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        x,
        kernel,
    )


def test_a_kernel_of_bfloat16_has_a_gradient_of_its_own_dtype():
    x, kernel = jnp.ones((1, 4, 4, 24), jnp.bfloat16), jnp.ones((3, 3, 24, 32), jnp.bfloat16)
    gradient = jax.grad(lambda k: convolution.conv(x, k, padding=1).sum().astype(jnp.float32))(
        kernel
    )
    assert gradient.dtype == jnp.bfloat16
    # The centre sees all 16 pixels, a corner 9 of them.
    np.testing.assert_array_equal(np.asarray(gradient[1, 1], np.float32), 16.0)
    np.testing.assert_array_equal(np.asarray(gradient[0, 0], np.float32), 9.0)


def test_upsampling():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 5, 4, 6)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 6, 7)).astype(np.float32)

    def plain(x, kernel):
        return _plain(x.repeat(2, axis=1).repeat(2, axis=2), kernel, ((1, 1), (1, 1)))

    _same(convolution.upsampled_conv, plain, x, kernel)


@pytest.mark.parametrize("stride, size", [(1, 6), (2, 6), (2, 7)])
@pytest.mark.parametrize("side", [3, 5])
def test_channels_apart(side, stride, size):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, size, size - 1, 4)).astype(np.float32)
    kernel = rng.normal(size=(side, side, 1, 4)).astype(np.float32)
    padding = convolution.same_padding(x.shape[1:3], side, stride)
    _same(
        lambda x, k: convolution.depthwise_conv(x, k, stride=stride, padding=padding),
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        ),
        x,
        kernel,
    )  # fmt: skip


@pytest.mark.parametrize("swish", [False, True])
def test_group_norm_is_that_of_flax(swish):
    rng = np.random.default_rng(2)
    x, scale, bias = (
        rng.normal(0.5, 2.0, size=s).astype(np.float32) for s in ((2, 5, 4, 6), (6,), (6,))
    )
    ours, theirs = GroupNorm(6, 3), nnx.GroupNorm(6, num_groups=3, epsilon=1e-6, rngs=nnx.Rngs(0))

    def run(module, call):
        graphdef = nnx.split(module)[0]
        return lambda x, s, b: call(nnx.merge(graphdef, {"scale": s, "bias": b}), x)

    after = jax.nn.swish if swish else lambda y: y
    _same(
        run(ours, lambda norm, x: norm(x, swish=swish)),
        run(theirs, lambda norm, x: after(norm(x))),
        x,
        scale,
        bias,
    )


def test_other_platforms_get_the_plain_convolution():
    x, kernel = jnp.zeros((1, 8, 8, 3)), jnp.zeros((3, 3, 3, 16))

    def program(platform):
        both = lambda x, k: convolution.conv(x, k, padding=1)  # noqa: E731
        traced = jax.jit(both).trace(x, kernel)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "stablehlo.convolution" in program("tpu") and "dot_general" not in program("tpu")
    assert "stablehlo.convolution" not in program("cpu") and "dot_general" in program("cpu")


def test_bfloat16_is_computed_and_returned():
    layer = convolution.Conv(3, 8, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer.kernel[...].dtype == jnp.float32
    assert layer(jnp.ones((1, 8, 8, 3))).dtype == jnp.bfloat16
    norm = GroupNorm(8, 4, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 8), jnp.bfloat16)
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(norm(x).astype(np.float32), GroupNorm(8, 4)(x), atol=0.02)


def test_a_flat_picture_has_a_finite_gradient():
    norm = GroupNorm(4, 2)
    flat = jnp.full((1, 4, 4, 4), 3.0)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(norm(x, swish=True) ** 2))(flat)).all()
