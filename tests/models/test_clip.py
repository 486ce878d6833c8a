"""Sizes of the published networks; pooling at the end token."""

import jax
import numpy as np
from flax import nnx

from vqd_jax.models import clip
from vqd_jax.models.image_encoder import ImageEncoderConfig
from vqd_jax.models.text_encoder import TextEncoderConfig

jax.config.update("jax_numpy_rank_promotion", "raise")

TINY = clip.ClipConfig(TextEncoderConfig(11, 6, 8, 2, 2), ImageEncoderConfig(8, 4, 6, 1, 2), 5)


def count(params):
    return sum(x.size for x in jax.tree.leaves(params))


def test_published_parameter_counts():
    small = clip.abstract_params(clip.VIT_B_32)
    # 63,428,096 are the text tower and its projection, as the published VQ-Diffusion files have it.
    assert count(small["text"]) + count(small["text_projection"]) == 63_428_096
    assert count(small) == 151_277_313
    assert count(clip.abstract_params(clip.VIT_L_14)) == 427_616_513


def test_the_text_feature_is_that_of_the_end_token():
    model = clip.Clip(TINY, rngs=nnx.Rngs(0))
    ids = np.array([[9, 5, 2, 10, 0, 0], [9, 10, 0, 0, 0, 0]])
    feature = model.embed_text(ids)
    assert feature.shape == (2, 5)
    np.testing.assert_allclose(np.linalg.norm(feature, axis=1), 1, rtol=1e-6)
    states = model.text(ids)
    pooled = np.stack([states[0, 3], states[1, 1]]) @ np.asarray(model.text_projection[...])
    expected = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(feature, expected, atol=1e-6)
    # What stands behind the end token is of no account.
    ids[0, 4:] = 7
    np.testing.assert_array_equal(model.embed_text(ids)[0], feature[0])


def test_bound_parameters_are_the_model():
    model = clip.Clip(TINY, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    run = jax.jit(lambda params: clip.bind(TINY, params).embed_images(images))
    feature = run(params)
    np.testing.assert_allclose(feature, model.embed_images(images), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(feature, axis=1), 1, rtol=1e-6)
