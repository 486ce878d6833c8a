"""Sizes of the published networks; pooling; the class token; how pictures are resized."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL
import pytest
from flax import nnx

from vqd_jax.models import clip
from vqd_jax.models.clip import ImageEncoder, ImageEncoderConfig, resize_and_crop
from vqd_jax.models.text_encoder import TextEncoderConfig

jax.config.update("jax_numpy_rank_promotion", "raise")

TINY = clip.ClipConfig(TextEncoderConfig(11, 6, 8, 2, 2), ImageEncoderConfig(8, 4, 6, 1, 2), 5)


def count(params):
    return sum(x.size for x in jax.tree.leaves(params))


def initial(module, config):
    return nnx.jit(lambda: module(config, rngs=nnx.Rngs(0)))()


def test_published_parameter_counts():
    small = clip.abstract_params(clip.VIT_B_32)
    # 63,428,096 are the text tower and its projection, as the published VQ-Diffusion files have it.
    assert count(small["text"]) + count(small["text_projection"]) == 63_428_096
    assert count(small) == 151_277_313
    assert count(clip.abstract_params(clip.VIT_L_14)) == 427_616_513


def test_the_text_feature_is_that_of_the_end_token():
    model = initial(clip.Clip, TINY)
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
    model = initial(clip.Clip, TINY)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    run = jax.jit(lambda params: clip.bind(TINY, params).embed_images(images))
    feature = run(params)
    np.testing.assert_allclose(feature, model.embed_images(images), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(feature, axis=1), 1, rtol=1e-6)


GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "clip.npz")
TOWER = ImageEncoderConfig(image_size=12, patch_size=4, width=8, num_layers=2, num_heads=2)


@pytest.fixture(scope="module")
def tower():
    return initial(ImageEncoder, TOWER)


@pytest.mark.slow
def test_every_pixel_reaches_the_feature(tower):
    images = np.random.default_rng(0).integers(0, 256, (1, 12, 12, 3), dtype=np.uint8)
    plain = tower(images)
    assert plain.shape == (1, 8) and plain.dtype == jnp.float32
    for row, column in ((0, 0), (5, 11), (11, 6)):
        changed = images.copy()
        changed[0, row, column] ^= 255
        assert np.abs(tower(changed) - plain).max() > 1e-5


def test_a_patch_is_a_square_of_pixels(tower):
    """The embedding of patch (1, 2) is the kernel times the pixels below it."""
    x = np.random.default_rng(1).normal(size=(1, 12, 12, 3)).astype(np.float32)
    kernel = np.asarray(tower.patch_embedding.kernel[...])
    expected = np.einsum("hwc,hwcd->d", x[0, 4:8, 8:12], kernel)
    np.testing.assert_allclose(tower.patch_embedding(x)[0, 1, 2], expected, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_is_near_float32(tower):
    images = np.random.default_rng(2).integers(0, 256, (2, 12, 12, 3), dtype=np.uint8)
    half = initial(ImageEncoder, dataclasses.replace(TOWER, dtype="bfloat16"))
    features = half(images)
    assert features.dtype == jnp.bfloat16
    np.testing.assert_allclose(features.astype(jnp.float32), tower(images), atol=0.1)


@pytest.mark.parametrize("size", ["16x16", "37x53", "40x19", "9x12"])
def test_resize_and_crop_is_the_published_one(size):
    index = ["16x16", "37x53", "40x19", "9x12"].index(size)
    image = resize_and_crop(GOLDEN[f"picture_{size}"], 16)
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    published = GOLDEN["pixels"][index].transpose(1, 2, 0) * clip.PIXEL_STD + clip.PIXEL_MEAN
    difference = np.abs(image - published * 255.0)
    # Pillow 12 resizes a tall picture along its axes in the other order; it rounds and clips in
    # between, which moves a few values of this noise.
    other_order = size == "40x19" and int(PIL.__version__.split(".")[0]) < 13
    assert difference.mean() < 0.5 if other_order else difference.max() < 1e-3
    standard = clip._standardise(image[None])[0] * clip.PIXEL_STD + clip.PIXEL_MEAN
    np.testing.assert_allclose(standard, image / 255.0, atol=1e-5)


def test_wrong_sizes_of_images_are_errors(tower):
    with pytest.raises(ValueError, match=r"image_encoder\.width=8 is not divisible"):
        dataclasses.replace(TOWER, num_heads=3)
    with pytest.raises(ValueError, match=r"image_size=12 is not divisible by .*patch_size=5"):
        dataclasses.replace(TOWER, patch_size=5)
    with pytest.raises(AssertionError):
        tower(np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(AssertionError):
        tower(np.zeros((1, 12, 12, 3), np.float32))
