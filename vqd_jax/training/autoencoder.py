"""Stage one: training the image tokenizer, as pure functions of a state.

Letters: B batch, S image side in pixels, N image tokens, K codes, E codebook dimension.

The loss is that of van den Oord et al., "Neural Discrete Representation Learning" (2017), with a
moving-average codebook, z the encoder's output and e the code nearest to it:

    reconstruction(x, decode(z + sg(e - z))) + commitment * |z - sg(e)|^2

The gradient of the decoder's input goes straight through to z. A published VQGAN adds a perceptual
and an adversarial term; both need networks that cost many times this one.
"""

import functools
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax

from vqd_jax.models import autoencoder, quantizer


@flax.struct.dataclass
class AutoencoderState:
    """Everything that a step changes or reads; a checkpoint of it is a complete one.

    Attributes:
        step: int32 scalar, the steps taken.
        params: parameters without the codebook (no `quantize` entry).
        codebook: `quantizer.CodebookState`.
        opt_state: the optimizer's moments.
        key: PRNG key of the run; a step uses `fold_in(key, step)`.
    """

    step: jax.Array
    params: Any
    codebook: quantizer.CodebookState
    opt_state: optax.OptState
    key: jax.Array


def learning_rate_schedule(options):
    """Step -> learning rate: linear from 0 over the warm-up, then a cosine to 0 at `num_steps`."""
    return optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, options.warmup_steps, options.num_steps
    )


def _optimizer(options):
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(learning_rate_schedule(options), b1=0.9, b2=0.99),
    )


def create_state(config, options, key):
    """The state before the first step; wrap in `jax.jit` to build it in one compiled call.

    Args:
        config: `autoencoder.AutoencoderConfig`.
        options: `config.AutoencoderOptions`.
        key: PRNG key.

    Returns:
        `AutoencoderState`.
    """
    init_key, codebook_key, key = jax.random.split(key, 3)
    params = autoencoder.init_params(config, init_key)
    del params["quantize"]
    return AutoencoderState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        codebook=quantizer.init_codebook(codebook_key, config.num_codes, config.codebook_dim),
        opt_state=_optimizer(options).init(params),
        key=key,
    )


def with_codebook(params, codebook):
    """Complete parameters for `autoencoder.bind`.

    Args:
        params: parameters without a codebook, as in `AutoencoderState.params`.
        codebook: float32 [K, E].
    """
    return {**params, "quantize": {"embedding": codebook}}


def _loss(params, codebook, images, config, options):
    model = autoencoder.bind(config, with_codebook(params, codebook))
    z = model.encode(images)
    codes = quantizer.nearest_codes(z, codebook)
    quantised = quantizer.lookup(codes, codebook)
    error = model.decode_latents(z + jax.lax.stop_gradient(quantised - z)) - images
    squared = jnp.mean(error**2)
    weight = options.squared_weight
    reconstruction = (1.0 - weight) * jnp.mean(jnp.abs(error)) + weight * squared
    commitment = jnp.mean((z - jax.lax.stop_gradient(quantised)) ** 2)
    loss = reconstruction + options.commitment * commitment
    metrics = {
        "loss": loss,
        "reconstruction": reconstruction,
        "commitment": commitment,
        "psnr": _psnr(squared),
    }
    return loss, (metrics, z, codes)


def _psnr(mean_squared_error):
    """Decibels, for values in [-1, 1]: the peak-to-peak amplitude is 2."""
    return 10.0 * jnp.log10(4.0 / jnp.maximum(mean_squared_error, 1e-10))


def train_step(state, images, *, config, options):
    """One step of Adam and of the codebook's moving average.

    Pure: `jax.jit(functools.partial(train_step, config=config, options=options),
    donate_argnums=0)` is the compiled step.

    Args:
        state: `AutoencoderState`.
        images: uint8 [B, S, S, 3].
        config: `autoencoder.AutoencoderConfig`.
        options: `config.AutoencoderOptions`.

    Returns:
        The next state and a dict of float32 scalars: `loss`, `reconstruction`, `commitment`,
        `psnr` (dB, of the batch before clipping to [-1, 1]), `perplexity` and `codes_used` (of
        the batch's codes), `gradient_norm` (before clipping), `learning_rate`.
    """
    chex.assert_type(images, jnp.uint8)
    pixels = autoencoder.from_pixels(images)
    loss = functools.partial(_loss, config=config, options=options)
    gradients, (metrics, z, codes) = jax.grad(loss, has_aux=True)(
        state.params, state.codebook.codebook, pixels
    )
    updates, opt_state = _optimizer(options).update(gradients, state.opt_state, state.params)
    codebook = quantizer.update_codebook(
        state.codebook,
        z,
        codes,
        key=jax.random.fold_in(state.key, state.step),
        decay=options.codebook_decay,
        revival_threshold=options.revival_threshold,
    )
    perplexity, codes_used = quantizer.code_usage(codes, config.num_codes)
    metrics |= {
        "perplexity": perplexity,
        "codes_used": codes_used,
        "gradient_norm": optax.tree.norm(gradients),
        "learning_rate": learning_rate_schedule(options)(state.step),
    }
    next_state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        codebook=codebook,
        opt_state=opt_state,
    )
    return next_state, metrics


def eval_reconstruction(params, codebook, images, *, config):
    """Images through the codes and back, with the loss of detail in numbers.

    Args:
        params: parameters without a codebook, as in `AutoencoderState.params`.
        codebook: float32 [K, E].
        images: uint8 [B, S, S, 3].
        config: `autoencoder.AutoencoderConfig`.

    Returns:
        A dict: `images` uint8 [B, S, S, 3], the reconstructions; `codes` int32 [B, N]; `psnr`
        float32 [B], in dB per picture, of the rounded pixels; `perplexity` and `codes_used`,
        float32 scalars over the batch.
    """
    chex.assert_type(images, jnp.uint8)
    model = autoencoder.bind(config, with_codebook(params, codebook))
    codes = model.codes(autoencoder.from_pixels(images))
    decoded = autoencoder.to_pixels(model.decode(codes))
    error = autoencoder.from_pixels(decoded) - autoencoder.from_pixels(images)
    perplexity, codes_used = quantizer.code_usage(codes, config.num_codes)
    return {
        "images": decoded,
        "codes": codes,
        "psnr": _psnr(jnp.mean(error**2, axis=(1, 2, 3))),
        "perplexity": perplexity,
        "codes_used": codes_used,
    }
