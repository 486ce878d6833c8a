import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vqd_jax.models.text_encoder import TextEncoder, TextEncoderConfig

jax.config.update("jax_numpy_rank_promotion", "raise")

CONFIG = TextEncoderConfig(vocab_size=11, context_length=6, width=8, num_layers=3, num_heads=2)


def initial(config):
    return nnx.jit(lambda: TextEncoder(config, rngs=nnx.Rngs(0)))()


def layer(stacked, index):
    return jax.tree.map(lambda x: x[index], stacked)


@pytest.fixture(scope="module")
def model():
    return initial(CONFIG)


IDS = np.array([[1, 5, 2, 9, 10, 0], [3, 3, 3, 10, 0, 0]])


def test_features_of_every_position(model):
    features = model(IDS)
    assert features.shape == (2, 6, 8)
    assert features.dtype == jnp.float32
    # After the final norm: mean 0 and variance 1 at the start.
    np.testing.assert_allclose(features.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(features.var(-1), 1, atol=2e-2)


def test_scanned_blocks_are_the_loop(model):
    h = model.token_embedding.embedding[...][IDS] + model.position_embedding[...][None]
    graphdef, params = nnx.split(model.blocks)
    for i in range(CONFIG.num_layers):
        h = nnx.merge(graphdef, layer(params, i))(h, None)
    np.testing.assert_allclose(model(IDS), model.norm_out(h), atol=1e-5)


@pytest.mark.slow
def test_no_position_sees_a_later_one(model):
    h = jax.random.normal(jax.random.key(0), (1, 6, 8))

    def features(h):
        graphdef, params = nnx.split(model.blocks)
        for i in range(CONFIG.num_layers):
            h = nnx.merge(graphdef, layer(params, i))(h, None)
        return h[0]

    # Largest effect of input position j on output position i.
    effect = np.abs(jax.jit(jax.jacobian(features))(h)[:, :, 0]).max((1, 3))
    assert (effect[np.triu_indices(6, 1)] == 0).all()
    assert (effect[np.tril_indices(6)] > 1e-6).all()


def test_ids_behind_a_position_do_not_move_it(model):
    changed = IDS.copy()
    changed[:, 3] = 7
    before, after = model(IDS), model(changed)
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (np.abs(before - after)[:, 3:].max(-1) > 1e-4).all()


def test_normalised_features_have_length_1(model):
    normal = initial(dataclasses.replace(CONFIG, normalize=True))
    features = normal(IDS)
    np.testing.assert_allclose(jnp.linalg.norm(features, axis=-1), 1, rtol=1e-5)
    plain = model(IDS)
    lengths = np.linalg.norm(plain, axis=-1, keepdims=True)
    np.testing.assert_allclose(features, plain / lengths, atol=1e-6)


def test_parameters_of_the_published_tower():
    config = TextEncoderConfig(49408, 77, 512, 12, 8)
    shapes = nnx.eval_shape(lambda: TextEncoder(config, rngs=nnx.Rngs(0)))
    total = sum(x.size for x in jax.tree.leaves(nnx.state(shapes, nnx.Param)))
    # ViT-B/32's text tower without the projection of the pooled feature, which nothing here uses:
    # embeddings, 12 layers of 12 D^2 + 13 D, and the final norm.
    assert total == 49408 * 512 + 77 * 512 + 12 * (12 * 512**2 + 13 * 512) + 2 * 512


def test_wrong_sizes_are_errors(model):
    with pytest.raises(ValueError, match=r"text_encoder\.width=8 is not divisible by .*=3"):
        dataclasses.replace(CONFIG, num_heads=3)
    with pytest.raises(AssertionError):
        model(IDS[:, :5])
