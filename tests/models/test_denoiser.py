import dataclasses

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
    modulations, context = model.modulations(time), model.text_context(text)
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
    picked = model.denoise(tokens, table[:, time - 1], model.text_context(text))
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


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_leaves_values_and_gradients(model, inputs, remat):
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


def count(config):
    shapes = nnx.eval_shape(lambda: Denoiser(config, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(shapes, nnx.Param)))


@pytest.mark.parametrize(
    ("sizes", "published"),
    [
        ({"num_codes": 2887, "width": 1024, "num_layers": 19}, 388_780_871),
        ({"num_codes": 4096, "width": 1408, "num_layers": 36}, 1_359_274_624),
    ],
)
def test_parameters_of_the_published_sizes(sizes, published):
    config = DenoiserConfig(grid=(32, 32), num_steps=100, num_heads=16, text_width=512, **sizes)
    assert count(config) == published


def test_width_must_be_divisible_by_the_heads():
    with pytest.raises(ValueError, match=r"denoiser\.width=8 is not divisible by .*=3"):
        dataclasses.replace(CONFIG, num_heads=3)


def test_tokens_must_fill_the_grid(model, inputs):
    with pytest.raises(AssertionError):
        model(inputs[0][:, :5], *inputs[1:])


def test_remat_names_are_checked_by_the_scan(model):
    assert set(attention.REMAT_POLICIES) == {"none", "dots", "full"}
