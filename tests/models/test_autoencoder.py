"""Shapes, sides of the padding, published parameter counts, and pixel conversions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vqd_jax.models import autoencoder, quantizer
from vqd_jax.models.autoencoder import AutoencoderConfig

jax.config.update("jax_numpy_rank_promotion", "raise")

TINY = AutoencoderConfig(
    image_size=16,
    channels=8,
    channel_multipliers=(1, 2, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    latent_channels=6,
    codebook_dim=5,
    num_codes=11,
    norm_groups=4,
)


@pytest.fixture(scope="module")
def tiny_params():
    return jax.jit(autoencoder.init_params, static_argnums=0)(TINY, jax.random.key(0))


def test_shapes_and_ranges(tiny_params):
    @jax.jit
    def run(params, images):
        model = autoencoder.bind(TINY, params)
        codes = model.codes(images)
        return model.encode(images), codes, model.decode(codes)

    images = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1.0)
    z, codes, decoded = run(tiny_params, images)
    assert z.shape == (2, 4, 4, 5) and z.dtype == jnp.float32
    assert codes.shape == (2, 16) and codes.dtype == jnp.int32
    assert decoded.shape == (2, 16, 16, 3) and decoded.dtype == jnp.float32
    assert float(jnp.max(jnp.abs(decoded))) <= 1.0
    # Row by row: token i is at row i // 4, column i % 4.
    codebook = tiny_params["quantize"]["embedding"]
    by_position = quantizer.nearest_codes(z, codebook)
    np.testing.assert_array_equal(codes[1, 7], by_position[1, 1, 3])
    # A changed corner of the picture changes the other pictures of the batch in nothing.
    other = run(tiny_params, images.at[0, 0, 0].add(0.5))
    np.testing.assert_array_equal(other[0][1], z[1])
    assert float(jnp.max(jnp.abs(other[0][0] - z[0]))) > 0.0


def _layers(config):
    return autoencoder._Layers(config, nnx.Rngs(0))


def test_wrong_image_size_is_refused(tiny_params):
    model = autoencoder.bind(TINY, tiny_params)
    with pytest.raises(AssertionError):
        model.encode(jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(AssertionError):
        model.decode(jnp.zeros((1, 15), jnp.int32))


def test_downsample_pads_right_and_bottom():
    layer = autoencoder.Downsample(1, _layers(TINY))
    layer.conv.kernel[...] = jnp.ones((3, 3, 1, 1))
    layer.conv.bias[...] = jnp.zeros(1)
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    # Rows 0-2 and columns 0-2; then columns 2-3 and a column of zeros; and so on.
    expected = [
        [0 + 1 + 2 + 4 + 5 + 6 + 8 + 9 + 10, 2 + 3 + 6 + 7 + 10 + 11],
        [8 + 9 + 10 + 12 + 13 + 14, 10 + 11 + 14 + 15],
    ]
    np.testing.assert_allclose(layer(x)[0, :, :, 0], expected)


def test_upsample_repeats_pixels():
    layer = autoencoder.Upsample(1, _layers(TINY))
    layer.conv.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    layer.conv.bias[...] = jnp.zeros(1)
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
    expected = [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    np.testing.assert_allclose(layer(x)[0, :, :, 0], expected)


def test_attention_averages_the_values_when_the_queries_are_zero():
    config = dataclasses.replace(TINY, norm_groups=2)
    block = autoencoder.AttentionBlock(4, _layers(config))
    block.q.kernel[...] = jnp.zeros((1, 1, 4, 4))
    block.v.kernel[...] = block.proj_out.kernel[...] = jnp.eye(4).reshape(1, 1, 4, 4)
    x = jax.random.normal(jax.random.key(0), (1, 3, 3, 4))
    groups = np.asarray(x).reshape(9, 2, 2)
    centred = groups - groups.mean(axis=(0, 2), keepdims=True)
    normed = centred / np.sqrt(groups.var(axis=(0, 2), keepdims=True) + 1e-6)
    expected = np.asarray(x) + normed.reshape(9, 4).mean(axis=0)[None, None, None]
    np.testing.assert_allclose(block(x), expected, atol=1e-5)


def test_the_decoder_mirrors_the_encoder(tiny_params):
    encoder, decoder = tiny_params["encoder"], tiny_params["decoder"]
    assert encoder["down"][1]["block"][0]["nin_shortcut"]["kernel"].shape == (1, 1, 8, 16)
    assert "nin_shortcut" not in encoder["down"][0]["block"][0]
    assert "downsample" not in encoder["down"][2] and "upsample" not in decoder["up"][0]
    assert sorted(decoder["up"][2]["attn"]) == [0, 1] and "attn" not in decoder["up"][1]
    assert sorted(encoder["mid"]) == ["attn_1", "block_1", "block_2"]
    assert decoder["conv_in"]["kernel"].shape == (3, 3, 6, 16)


# Published totals; the last was counted without its codebook, which is no parameter there.
@pytest.mark.parametrize(
    "channels, multipliers, attention, codebook_dim, num_codes, kind, total",
    [
        (128, (1, 1, 2, 4), 32, 256, 8192, "gumbel", 68_995_971),
        (128, (1, 1, 2, 2, 4), 16, 256, 16384, "nearest", 76_073_859),
        (128, (1, 1, 2, 2, 4), 16, 256, 1024, "nearest", 72_141_699),
        (64, (1, 2, 4, 8), 32, 128, 4096, "nearest", 63_485_379 + 4096 * 128),
    ],
    ids=["openimages_f8", "imagenet_f16", "ffhq_f16", "ithq_f8"],
)
def test_published_parameter_counts(
    channels, multipliers, attention, codebook_dim, num_codes, kind, total
):
    config = AutoencoderConfig(
        256, channels, multipliers, 2, (attention,), 256, codebook_dim, num_codes, quantizer=kind
    )
    shapes = autoencoder.abstract_params(config)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == total
    assert shapes["quantize"]["embedding"].shape == (num_codes, codebook_dim)
    assert config.downsampling == 2 ** (len(multipliers) - 1)


def test_pixels_round_trip():
    pixels = jnp.arange(256).astype(jnp.uint8)
    images = autoencoder.from_pixels(pixels)
    assert float(images[0]) == -1.0 and float(images[255]) == 1.0
    np.testing.assert_array_equal(autoencoder.to_pixels(images), pixels)
    clipped = autoencoder.to_pixels(jnp.array([-3.0, 3.0, 0.0]))
    np.testing.assert_array_equal(clipped, [0, 255, 128])


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 18},
        {"num_codes": 1},
        {"channels": 10},
        {"channel_multipliers": ()},
        {"num_res_blocks": 0},
        {"attention_resolutions": (5,)},
        {"codebook_dim": 0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_impossible_values_are_named(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=name) as error:
        dataclasses.replace(TINY, **change)
    assert str(value) in str(error.value)


def test_lists_become_tuples():
    config = dataclasses.replace(TINY, channel_multipliers=[1, 2, 2])
    assert config == TINY and hash(config) == hash(TINY)
    assert (config.downsampling, config.grid_size, config.num_tokens) == (4, 4, 16)


@pytest.mark.slow
def test_bfloat16_changes_results_by_rounding(tiny_params):
    images = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1.0)

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.value_and_grad, argnums=1)
    def gradient(dtype, params):
        params, pixels = jax.tree.map(lambda x: x.astype(dtype), (params, images))
        model = autoencoder.bind(TINY, params)
        decoded = model.decode_latents(model.encode(pixels))
        assert decoded.dtype == dtype
        return jnp.mean((decoded.astype(jnp.float32) - images) ** 2)

    exact, by_params = gradient(jnp.float32, tiny_params)
    rounded, found = gradient(jnp.bfloat16, tiny_params)
    np.testing.assert_allclose(rounded, exact, rtol=0.1)
    for part in ("encoder", "decoder"):
        a, b = (np.array(tree[part]["conv_in"]["kernel"]) for tree in (found, by_params))
        # Seen: 0.095 for the encoder with jax 0.10.2, 0.103 with jax 0.12; 0.065 for the decoder.
        assert np.linalg.norm(a - b) < 0.15 * np.linalg.norm(b)
