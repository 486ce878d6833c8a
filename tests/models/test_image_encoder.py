"""The class token sees every patch; pictures are resized and cropped as CLIP was trained."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vqd_jax.models import image_encoder
from vqd_jax.models.image_encoder import ImageEncoder, ImageEncoderConfig, resize_and_crop

jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "clip.npz")
CONFIG = ImageEncoderConfig(image_size=12, patch_size=4, width=8, num_layers=2, num_heads=2)


@pytest.fixture(scope="module")
def model():
    return ImageEncoder(CONFIG, rngs=nnx.Rngs(0))


def test_every_pixel_reaches_the_feature(model):
    images = np.random.default_rng(0).integers(0, 256, (1, 12, 12, 3), dtype=np.uint8)
    plain = model(images)
    assert plain.shape == (1, 8) and plain.dtype == jnp.float32
    for row, column in ((0, 0), (5, 11), (11, 6)):
        changed = images.copy()
        changed[0, row, column] ^= 255
        assert np.abs(model(changed) - plain).max() > 1e-5


def test_a_patch_is_a_square_of_pixels(model):
    """The embedding of patch (1, 2) is the kernel times the pixels below it."""
    x = np.random.default_rng(1).normal(size=(1, 12, 12, 3)).astype(np.float32)
    kernel = np.asarray(model.patch_embedding.kernel[...])
    expected = np.einsum("hwc,hwcd->d", x[0, 4:8, 8:12], kernel)
    np.testing.assert_allclose(model.patch_embedding(x)[0, 1, 2], expected, atol=1e-5)


def test_bfloat16_is_near_float32(model):
    images = np.random.default_rng(2).integers(0, 256, (2, 12, 12, 3), dtype=np.uint8)
    half = ImageEncoder(dataclasses.replace(CONFIG, dtype="bfloat16"), rngs=nnx.Rngs(0))
    features = half(images)
    assert features.dtype == jnp.bfloat16
    np.testing.assert_allclose(features.astype(jnp.float32), model(images), atol=0.1)


@pytest.mark.parametrize("size", ["16x16", "37x53", "40x19", "9x12"])
def test_resize_and_crop_is_the_published_one(size):
    index = ["16x16", "37x53", "40x19", "9x12"].index(size)
    image = resize_and_crop(GOLDEN[f"picture_{size}"], 16)
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    pixels = image_encoder._standardise(image[None])[0]
    np.testing.assert_allclose(pixels, GOLDEN["pixels"][index].transpose(1, 2, 0), atol=1e-5)


def test_wrong_sizes_are_errors(model):
    with pytest.raises(ValueError, match=r"image_encoder\.width=8 is not divisible"):
        dataclasses.replace(CONFIG, num_heads=3)
    with pytest.raises(ValueError, match=r"image_size=12 is not divisible by .*patch_size=5"):
        dataclasses.replace(CONFIG, patch_size=5)
    with pytest.raises(AssertionError):
        model(np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(AssertionError):
        model(np.zeros((1, 12, 12, 3), np.float32))
