import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vqd_jax.models import attention

jax.config.update("jax_numpy_rank_promotion", "raise")


def test_attend_is_the_formula():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 3, 4)).astype(np.float32) for n in (5, 7, 7))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / 2
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    exact = np.einsum("bhnm,bmhd->bnhd", p, v)
    np.testing.assert_allclose(attention.attend(q, k, v), exact, atol=1e-5)


@pytest.mark.parametrize(
    "dtype, head_width, capability, applies",
    [
        (jnp.bfloat16, 64, 9.0, True),
        (jnp.bfloat16, 88, 8.0, True),
        (jnp.float16, 128, 8.6, True),
        # VQ-Diffusion-S has 16 heads of 12.
        (jnp.bfloat16, 12, 9.0, True),
        (jnp.bfloat16, 136, 9.0, False),
        (jnp.float32, 64, 9.0, False),
        (jnp.bfloat16, 64, 7.5, False),
        (jnp.bfloat16, 64, 0.0, False),
    ],
)
def test_cudnn_is_asked_only_for_what_it_has(dtype, head_width, capability, applies):
    assert attention.cudnn_applies(jnp.dtype(dtype), head_width, capability) == applies


def test_only_a_gpu_of_nvidia_has_a_compute_capability():
    class Device:
        def __init__(self, platform, **attributes):
            self.platform = platform
            self.__dict__ |= attributes

    found = [
        attention.compute_capability(device)
        for device in (
            Device("gpu", compute_capability="9.0"),
            Device("gpu", compute_capability="gfx942"),
            Device("cpu"),
        )
    ]
    assert found == [9.0, 0.0, 0.0]


def test_the_stream_between_layers_is_constrained(stack):
    marked = []

    def constrain(x, heads_axis):
        marked.append((x.shape, heads_axis))
        return x

    placement = attention.Placement(constrain, 0.0)
    x, extras = jnp.ones((2, 3)), jnp.ones((4, 3))
    attention.scan_layers(stack, x, extras, placement=placement)
    # Before the first layer, and after each: a scan traces its body once.
    assert marked == [((2, 3), 0)] * 2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "num_queries, num_keys, width",
    [
        pytest.param(16, 77, 64, marks=pytest.mark.slow),
        pytest.param(77, 77, 12, marks=pytest.mark.slow),
        (6, 8, 8),
    ],
)
def test_what_is_padded_for_cudnn_changes_nothing(num_queries, num_keys, width, causal):
    # Here without cuDNN; what is compiled with it, tests/benchmarks/test_gpu_compile.py looks at.
    rng = np.random.default_rng(4)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, n, 3, width)), jnp.float32)
        for n in (num_queries, num_keys, num_keys)
    )

    def gradient(attend):
        return jax.value_and_grad(lambda *x: jnp.sum(attend(*x) ** 2), argnums=(0, 1, 2))(q, k, v)

    plain = gradient(
        lambda *x: jax.nn.dot_product_attention(*x, is_causal=causal, implementation="xla")
    )
    padded = gradient(lambda *x: attention.attend_padded(*x, causal=causal, implementation="xla"))
    for x, y in zip(jax.tree.leaves(padded), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_the_softmax_is_in_float32_under_bfloat16():
    # Of 2048 equal scores every weight is 2^-11; a sum of them in bfloat16 would stop at 2^-3.
    q, k = jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, 2048, 1, 8), jnp.bfloat16)
    v = jnp.ones((1, 2048, 1, 8), jnp.bfloat16)
    np.testing.assert_allclose(attention.attend(q, k, v).astype(jnp.float32), 1.0, rtol=1e-2)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_keys", [8, 1024])
def test_a_head_at_a_time_gives_what_all_at_once_give(num_keys, dtype, tolerance):
    # 2 images, 4 heads: more than 16 MB of scores with 1024 keys, less with 8.
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 4, 8)), dtype) for n in (1024, *2 * [num_keys]))
    exact = jax.nn.dot_product_attention(q, k, v, implementation="xla")
    ours = jax.jit(attention.attend)(q, k, v)
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours.astype(jnp.float32), exact.astype(jnp.float32), atol=tolerance)


def test_attention_has_its_gradient():
    rng = np.random.default_rng(3)
    qkv = [jnp.asarray(rng.normal(size=(2, 6, 2, 4)), jnp.float32) for _ in range(3)]

    def plain(q, k, v):
        scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) / 2
        return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores), v)

    ours = jax.grad(lambda *x: jnp.sum(attention.attend(*x) ** 2), argnums=(0, 1, 2))(*qkv)
    exact = jax.grad(lambda *x: jnp.sum(plain(*x) ** 2), argnums=(0, 1, 2))(*qkv)
    for x, y in zip(ours, exact, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.slow
def test_causal_attention_ignores_later_keys():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 6, 2, 4)), jnp.float32) for _ in range(3))
    for n in range(6):
        exact = attention.attend(q[:, n : n + 1], k[:, : n + 1], v[:, : n + 1])
        ours = attention.attend(q, k, v, causal=True)[:, n : n + 1]
        np.testing.assert_allclose(ours, exact, atol=1e-5)


def test_heads_split_and_merge():
    x = jnp.arange(24.0).reshape(1, 2, 12)
    split = attention.split_heads(x, 3)
    assert split.shape == (1, 2, 3, 4)
    np.testing.assert_array_equal(split[0, 0, 1], [4, 5, 6, 7])
    np.testing.assert_array_equal(attention.merge_heads(split), x)


def test_quick_gelu():
    x = jnp.array([-2.0, 0.0, 1.0])
    exact = [-2 / (1 + np.exp(3.404)), 0, 1 / (1 + np.exp(-1.702))]
    np.testing.assert_allclose(attention.quick_gelu(x), exact, rtol=1e-5)


@pytest.fixture(scope="module")
def stack():
    return attention.stack_layers(lambda rngs: Layer(rngs), 4, nnx.Rngs(0))


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x, extra):
        return jnp.tanh(self.linear(x)) + extra[None]


def layer(stack, index):
    graphdef, params = nnx.split(stack)
    return nnx.merge(graphdef, jax.tree.map(lambda p: p[index], params))


def test_layers_are_initialised_independently(stack):
    kernels = np.asarray(stack.linear.kernel[...])
    assert kernels.shape == (4, 3, 3)
    assert all(np.abs(kernels[i] - kernels[j]).max() > 0.1 for i in range(4) for j in range(i))


@pytest.mark.parametrize("remat", attention.REMAT_POLICIES)
def test_scanned_stack_is_the_loop(stack, remat):
    x = jax.random.normal(jax.random.key(0), (2, 3))
    extras = jax.random.normal(jax.random.key(1), (4, 3))
    h = x
    for i in range(4):
        h = layer(stack, i)(h, extras[i])
    np.testing.assert_allclose(attention.scan_layers(stack, x, extras, remat), h, atol=1e-6)


def test_mapped_method_has_a_leading_layer_axis(stack):
    x = jax.random.normal(jax.random.key(0), (2, 3))
    mapped = attention.map_layers(stack, lambda one: one.linear(x))
    for i in range(4):
        np.testing.assert_allclose(mapped[i], layer(stack, i).linear(x), atol=1e-6)


def test_unknown_dtype_is_an_error():
    assert attention.float_dtype("bfloat16") == jnp.bfloat16
    with pytest.raises(KeyError):
        attention.float_dtype("float16")
