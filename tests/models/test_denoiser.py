import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vqd_jax.models import attention
from vqd_jax.models.denoiser import Denoiser, DenoiserConfig

jax.config.update("jax_numpy_rank_promotion", "raise")

CONFIG = DenoiserConfig(
    num_codes=7, grid=(2, 3), num_steps=5, width=8, num_layers=3, num_heads=2, text_width=6
)


def initial(config):
    # Compiled as one: to compile every draw by itself takes longer than most tests.
    return nnx.jit(lambda: Denoiser(config, rngs=nnx.Rngs(0)))()


def layer(stacked, index):
    return jax.tree.map(lambda x: x[index], stacked)


@pytest.fixture(scope="module")
def model():
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Denoiser(CONFIG, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    # Larger than at the start of training, so that every part shows in the logits.
    return nnx.merge(
        graphdef, jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), p.dtype), state)
    )


@pytest.fixture(scope="module")
def inputs():
    tokens = jax.random.randint(jax.random.key(0), (4, 6), 0, 8)
    time = jnp.array([1, 5, 3, 3])
    return tokens, time, jax.random.normal(jax.random.key(2), (4, 5, 6))


def test_logits_are_float32_of_every_code(model, inputs):
    logits = model(*inputs)
    assert logits.shape == (4, 6, 7)
    assert logits.dtype == jnp.float32


def test_scanned_blocks_are_the_loop(model, inputs):
    tokens, time, text = inputs
    position = (
        model.row_embedding.embedding[...][np.repeat([0, 1], 3)]
        + (model.column_embedding.embedding[...][np.tile([0, 1, 2], 2)])
    )
    h = model.code_embedding.embedding[...][tokens] + position[None]
    graphdef, params = nnx.split(model.blocks)
    modulations, context = model.modulations(time), model.context(text)
    for i in range(CONFIG.num_layers):
        block = nnx.merge(graphdef, layer(params, i))
        text_i = layer(context, i)
        keys, values = block.cross_attention.keys_values(text)
        np.testing.assert_allclose(text_i.keys, keys, atol=1e-5)
        np.testing.assert_allclose(text_i.values, values, atol=1e-5)
        h = block(h, (block.modulations(time), text_i))
    logits = model.to_logits(model.norm_out(h))
    np.testing.assert_allclose(model(tokens, time, text), logits, atol=1e-4)
    np.testing.assert_allclose(
        model.denoise(tokens, modulations, context), model(tokens, time, text), atol=1e-6
    )


def test_modulations_of_all_times_serve_every_time(model, inputs):
    tokens, time, text = inputs
    table = model.modulations(jnp.arange(1, CONFIG.num_steps + 1))
    assert table.shape == (3, 5, 2, 2, 8)
    picked = model.denoise(tokens, table[:, time - 1], model.context(text))
    np.testing.assert_allclose(picked, model(tokens, time, text), atol=1e-5)


def test_adaptive_norm_is_the_formula(model, inputs):
    graphdef, params = nnx.split(model.blocks)
    norm = nnx.merge(graphdef, layer(params, 1)).norm_self
    h = np.asarray(jax.random.normal(jax.random.key(5), (2, 3, 8)), np.float64)
    times = np.array([2, 5])
    embedding = np.asarray(norm.embedding.embedding[...], np.float64)[times - 1]
    silu = embedding / (1 + np.exp(-embedding))
    scale_shift = silu @ np.asarray(norm.linear.kernel[...]) + np.asarray(norm.linear.bias[...])
    scale, shift = np.split(scale_shift[:, None], 2, axis=-1)
    normal = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    ours = norm(jnp.asarray(h, jnp.float32), norm.modulation(jnp.asarray(times)))
    np.testing.assert_allclose(ours, normal * (1 + scale) + shift, atol=1e-4)


@pytest.fixture(params=[False, True] if hasattr(jax.config, "jax_remat3") else [False])
def remat3(request):
    """Also with the coming implementation of ``jax.checkpoint``, where JAX has it."""
    if request.param:
        jax.config.update("jax_remat3", True)
    yield request.param
    if request.param:
        jax.config.update("jax_remat3", False)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_leaves_values_and_gradients(model, inputs, remat, remat3):
    graphdef, params = nnx.split(model, nnx.Param)

    def loss(params, policy):
        bound = nnx.merge(graphdef, params)
        bound.config = dataclasses.replace(CONFIG, remat=policy)
        return jnp.sum(jax.nn.log_softmax(bound(*inputs))[..., 0] ** 2)

    plain = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, gradient = plain(params, "none")
    other_value, other_gradient = plain(params, remat)
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max() + 1e-6),
        gradient,
        other_gradient,
    )
    # Nothing is cut off: every parameter matters but the keys' bias, which softmax cancels.
    largest = jax.tree.map(lambda g: float(jnp.abs(g).max()), nnx.to_pure_dict(gradient))
    for path, slope in jax.tree_util.tree_leaves_with_path(largest):
        name = jax.tree_util.keystr(path)
        assert slope > 1e-3 or name.endswith("['key']['bias']"), name


def test_tokens_times_and_texts_matter(model, inputs):
    tokens, time, text = inputs
    base = model(tokens, time, text)
    # One token: all positions of its image notice, no other image does.
    changed = model(tokens.at[1, 2].set((tokens[1, 2] + 1) % 8), time, text) - base
    assert (jnp.abs(changed[1]).max(-1) > 1e-4).all()
    assert jnp.abs(changed[np.array([0, 2, 3])]).max() < 1e-5
    for other in (model(tokens, time.at[1].set(4), text), model(tokens, time, text.at[1].add(0.5))):
        assert (jnp.abs(other - base)[1].max(-1) > 1e-4).all()
        assert jnp.abs(other - base)[np.array([0, 2, 3])].max() < 1e-5


def test_rows_and_columns_are_told_apart(model):
    # One token everywhere: only the positions differ, and all six do.
    logits = model(jnp.full((1, 6), 7), jnp.array([5]), jnp.ones((1, 5, 6)))[0]
    for i in range(6):
        for j in range(i):
            assert jnp.abs(logits[i] - logits[j]).max() > 1e-3


@pytest.mark.slow
def test_bfloat16_is_near_and_leaves_parameters_alone(model, inputs):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    low = nnx.merge(
        nnx.graphdef(nnx.eval_shape(lambda: Denoiser(config, rngs=nnx.Rngs(0)))),
        nnx.state(model, nnx.Param),
    )
    logits = low(*inputs)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, model(*inputs), atol=0.2)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(low, nnx.Param)))


def test_guidance_of_bfloat16_logits_is_that_of_float32_logits():
    """Total variation at guidance 5; with logits rounded to bfloat16 it is 0.020."""
    config = dataclasses.replace(CONFIG, num_codes=200, width=64, dtype="bfloat16", init_std=0.125)
    model = initial(config)
    kernel = model.to_logits.kernel[...]
    bias = model.to_logits.bias[...] = 2 * jax.random.normal(jax.random.key(1), (200,))
    noise = jax.random.normal(jax.random.key(2), (2, 1, 256, 64))
    conditional = noise[0].astype(jnp.bfloat16)
    unconditional = (noise[0] + 0.3 * noise[1]).astype(jnp.bfloat16)

    def guided(logits):
        p, q = (jax.nn.log_softmax(logits(h)) for h in (conditional, unconditional))
        return jax.nn.softmax(q + 5 * (p - q))

    def exact(h):
        return jnp.matmul(h.astype(jnp.float32), kernel, precision="highest") + bias[None, None]

    distance = jnp.abs(guided(model.logits) - guided(exact)).sum(-1) / 2
    assert distance.mean() < 0.002


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_have_the_gradient_of_a_product(dtype):
    model = initial(dataclasses.replace(CONFIG, dtype=dtype))
    h = jax.random.normal(jax.random.key(0), (2, 6, 8)).astype(dtype)
    weights = jax.random.normal(jax.random.key(1), (2, 6, 7))
    ours = jax.grad(lambda h: jnp.sum(weights * model.logits(h)))(h)
    assert ours.dtype == h.dtype
    exact = jnp.einsum("bnk,dk->bnd", weights, model.to_logits.kernel[...])
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=2e-2, atol=2e-3)
    # What is multiplied in the gradient has the compute dtype: other products are slow.
    gradient = jax.jit(jax.grad(lambda h: jnp.sum(weights * model.logits(h))))
    program = gradient.lower(h).as_text()
    products = re.findall(r"dot_general.*: \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\)", program)
    assert set(products) == {({"float32": "f32", "bfloat16": "bf16"}[dtype],) * 2}


def count(config):
    shapes = nnx.eval_shape(lambda: Denoiser(config, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(shapes, nnx.Param)))


TEXT = {"text_width": 512, "grid": (32, 32)}
IMAGENET = {
    "num_codes": 974, "width": 512, "num_layers": 24, "mlp": "conv", "grid": (16, 16),
    "position_table": (32, 32), "condition": "class", "num_classes": 1000,
}  # fmt: skip
FFHQ = {
    "num_codes": 1024, "width": 512, "num_layers": 20, "mlp": "conv", "grid": (16, 16),
    "position_table": (32, 32), "condition": "none",
}  # fmt: skip
SMALL = {"num_codes": 2887, "width": 192, "num_layers": 18, "mlp": "conv", "mlp_ratio": 2}


@pytest.mark.parametrize(
    ("sizes", "published"),
    [
        ({"num_codes": 2887, "width": 1024, "num_layers": 19} | TEXT, 388_780_871),
        ({"num_codes": 4096, "width": 1408, "num_layers": 36} | TEXT, 1_359_274_624),
        (SMALL | TEXT, 35_936_647),
        (IMAGENET, 518_025_678),
        (IMAGENET | {"learned_null": True}, 518_037_966),
        (FFHQ, 411_185_664),
    ],
)
def test_parameters_of_the_published_sizes(sizes, published):
    config = DenoiserConfig(num_steps=100, num_heads=16, **sizes)
    assert count(config) == published


SMALL_CLASS = DenoiserConfig(
    num_codes=7, grid=(2, 3), num_steps=5, width=8, num_layers=2, num_heads=2, mlp="conv",
    condition="class", num_classes=4, position_table=(3, 5),
)  # fmt: skip


@pytest.mark.slow
def test_labels_matter_and_the_null_label_is_the_mean_row():
    model = initial(SMALL_CLASS)
    tokens, time = jnp.array([[7, 1, 2, 7, 3, 0]] * 5), jnp.full(5, 3)
    logits = model(tokens, time, jnp.arange(5))
    for i in range(5):
        for j in range(i):
            assert jnp.abs(logits[i] - logits[j]).max() > 1e-6
    # A table whose rows are all the mean answers every label as the null label.
    table = model.blocks.norm_mlp.embedding.embedding
    assert table.shape == (2, 4, 8)
    table[...] = jnp.broadcast_to(table[...].mean(1, keepdims=True), table.shape)
    flat = model(tokens, time, jnp.arange(5))
    np.testing.assert_allclose(flat, jnp.broadcast_to(logits[4:], flat.shape), atol=1e-6)


def test_a_learned_null_is_a_row_of_its_own():
    model = initial(dataclasses.replace(SMALL_CLASS, learned_null=True))
    assert model.blocks.norm_mlp.embedding.embedding.shape == (2, 5, 8)


def test_a_larger_position_table_is_flattened_and_cut():
    model = initial(SMALL_CLASS)
    rows = model.row_embedding.embedding[...]
    columns = model.column_embedding.embedding[...]
    # Six tokens of a table with five columns: the sixth begins its second row.
    expected = np.asarray(rows)[[0, 0, 0, 0, 0, 1]] + np.asarray(columns)[[0, 1, 2, 3, 4, 0]]
    np.testing.assert_allclose(model.positions()[0], expected, rtol=1e-6)


def test_a_convolution_sees_the_grid():
    # Six tokens in a line, then as a grid: other neighbours, other answers.
    config = dataclasses.replace(SMALL_CLASS, condition="none", num_classes=0)
    flat = dataclasses.replace(config, grid=(1, 6), position_table=(3, 6))
    square = dataclasses.replace(config, grid=(2, 3), position_table=(3, 6))
    models = initial(flat), initial(square)
    tokens, time = jnp.array([[7, 1, 2, 7, 3, 0]]), jnp.array([3])
    answers = [model(tokens, time) for model in models]
    assert jnp.abs(answers[0] - answers[1]).max() > 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"condition": "text", "num_classes": 0}, "text_width=0"),
        ({"condition": "image"}, "condition='image'"),
        ({"mlp": "dense"}, "mlp='dense'"),
        ({"position_table": (1, 5)}, r"smaller than the grid"),
    ],
)
def test_impossible_variants_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL_CLASS, **change)


def test_width_must_be_divisible_by_the_heads():
    with pytest.raises(ValueError, match=r"denoiser\.width=8 is not divisible by .*=3"):
        dataclasses.replace(CONFIG, num_heads=3)


def test_tokens_must_fill_the_grid(model, inputs):
    with pytest.raises(AssertionError):
        model(inputs[0][:, :5], *inputs[1:])


def test_remat_names_are_checked_by_the_scan(model):
    assert set(attention.REMAT_POLICIES) == {"none", "dots", "full"}


@pytest.mark.slow
def test_what_remat_works_out_again(remat3):
    def products(remat):
        """In the gradient, of one layer and what is outside of them."""
        config = dataclasses.replace(CONFIG, remat=remat)
        graphdef, params = nnx.split(initial(config))
        tokens, time, text = jnp.zeros((2, 6), int), jnp.ones(2, int), jnp.ones((2, 5, 6))
        gradient = jax.grad(lambda params: nnx.merge(graphdef, params)(tokens, time, text).sum())
        return jax.jit(gradient).lower(params).as_text().count("stablehlo.dot_general")

    none, dots, full = map(products, ("none", "dots", "full"))
    assert full - none == 11
    # Two products of each attention, without cuDNN; with "full" seven projections too. The first
    # versions of remat3 ask no policy but JAX's own.
    old = remat3 and jax.__version_info__ < (0, 12)
    assert dots - none in ((4, 11) if old else (4,))
