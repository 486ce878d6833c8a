"""Code remaps: the published rule, the way back, and an autoencoder that has one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vqd_jax.models import autoencoder, quantizer
from vqd_jax.models.autoencoder import AutoencoderConfig

jax.config.update("jax_numpy_rank_promotion", "raise")

CONFIG = AutoencoderConfig(
    image_size=8,
    channels=4,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(),
    latent_channels=5,
    codebook_dim=5,
    num_codes=9,
    norm_groups=2,
)
INIT = jax.jit(autoencoder.init_params, static_argnums=0)
COUNTS = np.array([0, 5, 0, 0, 1, 2, 0, 8, 0])


def test_used_codes_are_numbered_from_1_and_the_others_are_0():
    remap = quantizer.build_remap(COUNTS)
    np.testing.assert_array_equal(remap, [0, 1, 0, 0, 2, 3, 0, 4, 0])
    assert remap.dtype == np.int32
    assert quantizer.num_remapped(remap) == 5
    # Id 0 goes back to the first code that nobody uses.
    np.testing.assert_array_equal(quantizer.code_to_full(remap, 5), [0, 1, 4, 5, 7])
    later = quantizer.build_remap([3, 0, 1, 0])
    np.testing.assert_array_equal(quantizer.code_to_full(later, 3), [1, 0, 2])


def test_a_codebook_in_full_use_stays():
    np.testing.assert_array_equal(quantizer.build_remap([1, 2, 1]), [0, 1, 2])


@pytest.mark.parametrize(
    "remap, message",
    [
        ([0, 1, 3], "no full code has the id 2, but one has 3"),
        ([1, 2, 3], "no full code has the id 0"),
        ([-1, 0, 1], "no full code has the id 0, but one has -1"),
        ([[0, 1]], "not a vector"),
        ([0.0, 1.0], "float64"),
    ],
)
def test_what_is_no_remap_is_named(remap, message):
    with pytest.raises(ValueError, match=message):
        quantizer.num_remapped(np.array(remap))


@pytest.mark.slow
@pytest.mark.parametrize("kind", autoencoder.QUANTIZERS)
def test_an_autoencoder_with_codes_left_out(kind):
    config = dataclasses.replace(CONFIG, quantizer=kind)
    params = INIT(config, jax.random.key(0))
    remap = quantizer.build_remap(COUNTS)
    smaller, remapped = autoencoder.with_remap(config, params, remap)
    assert (smaller.num_codes, smaller.codebook_size) == (5, 9)
    assert jax.tree.map(jnp.shape, remapped) == jax.tree.map(
        lambda x: x.shape, autoencoder.abstract_params(smaller)
    )
    whole, part = autoencoder.bind(config, params), autoencoder.bind(smaller, remapped)
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1.0)
    np.testing.assert_array_equal(part.codes(images), remap[np.asarray(whole.codes(images))])
    codes = jnp.arange(32).reshape(2, 16) % 5
    full = jnp.array([0, 1, 4, 5, 7])[codes]
    np.testing.assert_array_equal(part.decode(codes), whole.decode(full))
    with pytest.raises(ValueError, match="it has a remap"):
        autoencoder.with_remap(smaller, remapped, remap)
    with pytest.raises(ValueError, match="it is for 3 codes, the codebook has 9"):
        autoencoder.with_remap(config, params, [0, 1, 2])


def test_initial_parameters_keep_the_first_codes():
    config = dataclasses.replace(CONFIG, num_codes=4, codebook_size=7)
    params = INIT(config, jax.random.key(0))
    np.testing.assert_array_equal(params["remap"]["full_to_code"], [0, 1, 2, 3, 0, 0, 0])
    assert params["quantize"]["embedding"].shape == (7, 5)


def test_impossible_values_are_named():
    with pytest.raises(ValueError, match=r"quantizer='ema': must be one of"):
        dataclasses.replace(CONFIG, quantizer="ema")
    with pytest.raises(ValueError, match=r"codebook_size=8: must be at least num_codes=9"):
        dataclasses.replace(CONFIG, codebook_size=8)


def test_nothing_trains_the_remap():
    config = dataclasses.replace(CONFIG, num_codes=4, codebook_size=7)
    model = nnx.eval_shape(lambda: autoencoder.Autoencoder(config, rngs=nnx.Rngs(0)))
    trained = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert {x.dtype for x in trained} == {jnp.dtype(jnp.float32)}
    # It is in the nested dict, and so in a model folder, under the name that it always had.
    assert autoencoder.abstract_params(config)["remap"]["full_to_code"].shape == (7,)
