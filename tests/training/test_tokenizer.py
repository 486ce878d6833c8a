"""The stage-one step: it learns, it repeats bit for bit, and its numbers are what they say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqd_jax.evaluation import measures
from vqd_jax.models import autoencoder
from vqd_jax.models.autoencoder import AutoencoderConfig
from vqd_jax.options import AutoencoderOptions
from vqd_jax.training import tokenizer as training

jax.config.update("jax_numpy_rank_promotion", "raise")

CONFIG = AutoencoderConfig(
    image_size=16,
    channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(),
    latent_channels=8,
    codebook_dim=4,
    num_codes=16,
    norm_groups=4,
)
OPTIONS = AutoencoderOptions(
    num_steps=120, learning_rate=1e-2, warmup_steps=5, codebook_decay=0.9, revival_threshold=0.3
)


def _pictures(count):
    """Discs of two sizes in four colours on white, uint8 [count, 16, 16, 3]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    pictures = np.full((count, 16, 16, 3), 255, np.uint8)
    colours = np.array([[230, 40, 30], [30, 160, 60], [20, 60, 200], [250, 200, 40]])
    for picture in pictures:
        centre = rng.integers(5, 11, 2)
        inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < rng.choice([9, 25])
        picture[inside] = colours[rng.integers(4)]
    return pictures


@pytest.fixture(scope="module")
def step():
    return jax.jit(functools.partial(training.train_step, config=CONFIG, options=OPTIONS))


@pytest.fixture(scope="module")
def start():
    return jax.jit(functools.partial(training.create_state, CONFIG, OPTIONS))(jax.random.key(0))


def _run(step, state, pictures, steps):
    history = []
    for index in range(steps):
        batch = np.roll(pictures, -16 * index, axis=0)[:16]
        state, metrics = step(state, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def test_training_reconstructs_and_uses_the_codebook(step, start):
    pictures = _pictures(64)
    state, history = _run(step, start, pictures, OPTIONS.num_steps)
    assert int(state.step) == OPTIONS.num_steps
    assert history[-1]["loss"] < 0.1 * history[0]["loss"]
    assert history[-1]["perplexity"] > 7.0
    assert history[-1]["learning_rate"] < 1e-4 < history[4]["learning_rate"]
    images, codes = jax.jit(functools.partial(training.reconstruct, config=CONFIG))(
        training.result(state), pictures
    )
    assert images.shape == (64, 16, 16, 3) and images.dtype == jnp.uint8
    assert codes.shape == (64, 64)
    assert measures.psnr(np.asarray(images), pictures).mean() > 18.0


def test_a_resumed_run_is_the_uninterrupted_run(step, start):
    pictures = _pictures(64)
    straight, _ = _run(step, start, pictures, 4)
    half, _ = _run(step, start, pictures, 2)
    copied = jax.tree.map(lambda x: jnp.array(x, copy=True), half)
    resumed, _ = _run(step, copied, np.roll(pictures, -32, axis=0), 2)
    leaves = zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True)
    for a, b in leaves:
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(a, b)


def test_the_first_step_seeds_the_codebook_from_the_encoder(step, start):
    pictures = _pictures(16)
    state, _ = step(start, pictures)
    model = autoencoder.bind(CONFIG, training.complete(start))
    images = autoencoder.from_pixels(jnp.asarray(pictures))
    z = np.asarray(model.encode(images)).reshape(-1, 4)
    chosen = np.asarray(model.codes(images)).reshape(-1)
    popular = 0
    for code, vector in enumerate(np.asarray(state.codebook.codebook)):
        count = np.sum(chosen == code)
        if (1 - OPTIONS.codebook_decay) * count >= OPTIONS.revival_threshold * len(z) / 16:
            np.testing.assert_allclose(vector, z[chosen == code].mean(axis=0), atol=1e-4)
            popular += 1
        else:
            assert np.abs(z - vector).max(axis=1).min() < 1e-5
    assert 0 < popular < 16


@functools.partial(jax.jit, static_argnums=2)
def _gradients(state, pictures, options):
    """Gradients, (latents, codes) and metrics of a batch."""
    return training._gradients(
        None,
        jax.random.key(0),
        pictures,
        state=state,
        config=CONFIG,
        options=options,
        whole=lambda tree: tree,
    )


@pytest.mark.slow
def test_gradients_pass_straight_through_the_codes(start):
    options = dataclasses.replace(OPTIONS, commitment=0.0)
    gradients, _, _ = _gradients(start, jnp.asarray(_pictures(4)), options)
    kernel = gradients["autoencoder"]["encoder"]["conv_in"]["kernel"]
    assert float(jnp.max(jnp.abs(kernel))) > 1e-6


def test_reconstruction_terms_by_hand(start):
    pixels = jnp.asarray(_pictures(4))
    options = dataclasses.replace(OPTIONS, squared_weight=0.25, commitment=0.5)
    _, (z, codes), metrics = _gradients(start, pixels, options)
    chosen = np.asarray(start.codebook.codebook)[np.asarray(codes)]
    decode = jax.jit(lambda p, z: autoencoder.bind(CONFIG, p).decode_latents(z))
    made = np.asarray(decode(training.complete(start), chosen))
    error = made - np.asarray(autoencoder.from_pixels(pixels))
    reconstruction = 0.75 * np.abs(error).mean() + 0.25 * (error**2).mean()
    commitment = ((np.asarray(z) - chosen) ** 2).mean()
    np.testing.assert_allclose(metrics["reconstruction"], reconstruction, rtol=1e-4)
    np.testing.assert_allclose(metrics["commitment"], commitment, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], reconstruction + 0.5 * commitment, rtol=1e-4)
    np.testing.assert_allclose(metrics["psnr"], 10 * np.log10(4 / (error**2).mean()), rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"warmup_steps": 10},
        {"learning_rate": 0.0},
        {"squared_weight": 1.5},
        {"codebook_decay": 1.0},
        {"commitment": -1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_impossible_options_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        AutoencoderOptions(**({"num_steps": 10, "learning_rate": 1e-3, "warmup_steps": 1} | change))


@pytest.mark.slow
def test_decoder_only_leaves_the_codes_as_they_are(step, start):
    pictures = _pictures(64)
    trained, before = _run(step, start, pictures, 40)
    options = dataclasses.replace(OPTIONS, decoder_only=True, init_from="trained")
    further = jax.jit(functools.partial(training.train_step, config=CONFIG, options=options))
    state = trained.replace(
        opt_state=jax.tree.map(jnp.zeros_like, trained.opt_state), step=jnp.zeros((), jnp.int32)
    )
    state, after = _run(further, state, pictures, 40)
    for name, part in training.complete(trained).items():
        same = jax.tree.map(np.array_equal, part, training.complete(state)[name])
        assert all(jax.tree.leaves(same)) == (name not in ("decoder", "post_quant_conv"))
    coded = jax.jit(functools.partial(training.reconstruct, config=CONFIG))
    np.testing.assert_array_equal(
        *(coded(training.result(s), pictures)[1] for s in (trained, state))
    )
    assert after[-1]["psnr"] > before[-1]["psnr"] + 1.0
