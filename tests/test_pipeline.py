import jax
import numpy as np
import pytest

from configs import tiny
from vqd_jax import config as config_lib
from vqd_jax.errors import UserError
from vqd_jax.models import autoencoder, text_to_image
from vqd_jax.pipeline import VQDiffusion

jax.config.update("jax_numpy_rank_promotion", "raise")

PROMPTS = ["red heart", "", "a black cat"]


@pytest.fixture(scope="module")
def model():
    config = tiny.get_config()
    params = text_to_image.init_params(config_lib.model_config(config), jax.random.key(0))
    # Large enough that the text and the guidance matter to an untrained network.
    params = jax.tree.map(lambda x: 8 * x, params)
    sizes = config_lib.autoencoder_config(config)
    return VQDiffusion(config, params, autoencoder.init_params(sizes, jax.random.key(1)))


@pytest.fixture(scope="module")
def made(model):
    return model.generate(PROMPTS, num_images=2, seed=3, trajectory=True)


def test_shapes_and_ranges(made):
    assert made.pixels.shape == (3, 2, 16, 16, 3)
    assert made.pixels.dtype == np.uint8
    assert len(made.images) == 6
    np.testing.assert_array_equal(np.asarray(made.images[3]), made.pixels[1, 1])
    assert made.codes.shape == (3, 2, 16)
    assert made.codes.min() >= 0
    assert made.codes.max() < 32
    assert made.trajectory.shape == (10, 3, 2, 16)
    np.testing.assert_array_equal(made.trajectory[-1], made.codes)


def test_every_step_unmasks_on_average_a_tenth(made):
    masked = (made.trajectory == 32).mean(axis=(1, 2, 3))
    assert np.all(np.diff(masked) <= 0)
    # Three standard deviations of the share among 96 tokens.
    np.testing.assert_allclose(masked, np.linspace(0.9, 0, 10), atol=0.15)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_image_does_not_depend_on_the_batch_size(model, made, batch_size):
    again = model.generate(PROMPTS, num_images=2, seed=3, batch_size=batch_size)
    np.testing.assert_array_equal(again.codes, made.codes)


def test_an_image_depends_on_its_seed_prompt_and_numbers_only(model, made):
    fewer = model.generate(PROMPTS[:1], num_images=1, seed=3)
    np.testing.assert_array_equal(fewer.codes[0, 0], made.codes[0, 0])
    other_seed = model.generate(PROMPTS, num_images=2, seed=4)
    assert (other_seed.codes != made.codes).any(axis=-1).all()
    other_prompt = model.generate(["blue heart"], num_images=1, seed=3)
    assert (other_prompt.codes[0, 0] != made.codes[0, 0]).any()
    flat = made.codes.reshape(6, 16)
    assert len(np.unique(flat, axis=0)) == 6


def test_scale_seed_and_prompt_do_not_recompile(model):
    model.generate(["a"], num_images=1, guidance_scale=2.0, truncation=0.9)
    compiled = model._sample._cache_size()
    model.generate(["b"], num_images=1, guidance_scale=4.0, truncation=0.5, seed=9)
    assert model._sample._cache_size() == compiled


def test_fewer_steps(model):
    made = model.generate(["red heart"], num_steps=3, trajectory=True)
    assert made.trajectory.shape == (3, 1, 1, 16)


def test_reconstruction_goes_through_the_codes(model):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3)).astype(np.uint8)
    whole = model.reconstruct(images)
    assert whole.shape == images.shape
    np.testing.assert_array_equal(model.reconstruct(images, batch_size=2), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "num_images=0"),
        ({"num_steps": 11}, "num_steps=11"),
        ({"seed": -1}, "seed=-1"),
        ({"guidance_scale": -2.0}, r"guidance_scale=-2\.0"),
        ({"truncation": 0.0}, r"truncation=0\.0"),
    ],
)
def test_impossible_requests_are_named(model, options, message):
    with pytest.raises(UserError, match=message):
        model.generate(["x"], **options)


def test_no_prompt_is_an_error(model):
    with pytest.raises(UserError, match="at least one prompt"):
        model.generate([])
