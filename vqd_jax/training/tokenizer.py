"""The step of stage one: the losses of an image tokenizer, and both of its networks' updates.

With z the encoder's output, e the code nearest to it, and x' = decode(z + sg(e - z)), the loss is
that of a VQGAN (Esser et al., "Taming Transformers", CVPR 2021) with a moving-average codebook (van
den Oord et al., "Neural Discrete Representation Learning", 2017):

    reconstruction(x, x') + perceptual_weight * perceptual(x, x') - a * mean D(x')
        + commitment * |z - sg(e)|^2

The gradient of the decoder's input goes straight through to z. A Gumbel quantiser draws e, learns
it by gradients, and has a KL term in the place of the last one. The discriminator D learns to tell
x from x' by the hinge loss (``adversarial``). With all weights but the first and the last at 0, no
other network is made. With ``decoder_only``, the codes stay as they are: encoder and codebook have
no gradient, and x' = decode(e).

There is one forward pass of every network. The losses of the picture are differentiated by x', and
one pullback takes the sum of these gradients through the decoder and the encoder. The
discriminator's pass has two pullbacks: to x', and to its own parameters.

Letters: B batch, S image side in pixels, N image tokens, K codes, E codebook dimension, A parts of
a batch.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax

from vqd_jax.models import autoencoder, discriminator, perceptual, quantizer
from vqd_jax.models.autoencoder import AutoencoderConfig
from vqd_jax.options import AutoencoderOptions
from vqd_jax.training import adversarial, optimizer
from vqd_jax.training import task as task_lib


@flax.struct.dataclass
class AutoencoderState:
    """Everything that a step changes or reads; a checkpoint of it is a complete one.

    Attributes:
        step: int32 scalar, the steps taken.
        params: parameters; without the codebook (no `quantize` entry) unless it learns by
            gradients, as that of a Gumbel quantiser does.
        codebook: `quantizer.CodebookState`; None for a Gumbel quantiser.
        opt_state: the optimizer's moments.
        key: PRNG key of the run; a step uses `fold_in(key, step)`.
    """

    step: jax.Array
    params: Any
    codebook: quantizer.CodebookState | None
    opt_state: optax.OptState
    key: jax.Array


@flax.struct.dataclass
class DiscriminatorState:
    """The other network of a VQGAN.

    Attributes:
        params: of `models.discriminator`.
        opt_state: the moments of its optimizer.
        lecam: averages of its logits; see `adversarial.lecam`.
    """

    params: Any
    opt_state: optax.OptState
    lecam: adversarial.LecamState


@flax.struct.dataclass
class VqganState(AutoencoderState):
    """The state where more than one network is there, or weights are averaged.

    Attributes:
        averaged: complete parameters of the autoencoder, averaged; None where none are.
        perceptual: parameters of the network of the perceptual distance; nothing changes them.
        discriminator: `DiscriminatorState`, or None.
    """

    averaged: Any = None
    perceptual: Any = None
    discriminator: DiscriminatorState | None = None


def _optimizer(options: AutoencoderOptions) -> tuple[optax.GradientTransformation, optax.Schedule]:
    rate = optimizer.learning_rate(
        options.learning_rate, options.warmup_steps, options.num_steps, options.final_learning_rate
    )
    adam = optax.adam(rate, b1=options.adam_b1, b2=options.adam_b2)
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), adam), rate


def _discriminator_optimizer(options: AutoencoderOptions) -> optax.GradientTransformation:
    """Adam, which counts the steps from ``adversarial_start``; its rate goes by the run's steps."""
    rate = optimizer.learning_rate(
        options.discriminator_learning_rate,
        options.warmup_steps,
        options.num_steps,
        options.final_learning_rate,
    )
    adam = optax.adam(
        lambda count: rate(count + options.adversarial_start),
        b1=options.adam_b1,
        b2=options.adam_b2,
    )
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), adam)


def create_state(
    config: AutoencoderConfig, options: AutoencoderOptions, key: jax.Array
) -> AutoencoderState:
    """The state before the first step; wrap in `jax.jit` to build it in one compiled call.

    The network of the perceptual distance has zeros: its weights are put in from a file.

    Args:
        config: `autoencoder.AutoencoderConfig`.
        options: `options.AutoencoderOptions`.
        key: PRNG key.

    Returns:
        `AutoencoderState`, or `VqganState` if the options ask for what that has.
    """
    init_key, codebook_key, key = jax.random.split(key, 3)
    params, codebook = autoencoder.init_params(config, init_key), None
    if config.quantizer == "nearest":
        del params["quantize"]
        codebook = quantizer.init_codebook(codebook_key, config.num_codes, config.codebook_dim)
    state = AutoencoderState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        codebook=codebook,
        opt_state=_optimizer(options)[0].init(params),
        key=key,
    )
    judged = options.adversarial_weight > 0
    if not (judged or options.perceptual_weight or options.ema_decay):
        return state
    seen = perceptual.abstract_params(options.perceptual_config())
    return VqganState(
        **vars(state),
        # A copy: a donated state must not hold one buffer twice.
        averaged=jax.tree.map(jnp.copy, complete(state)) if options.ema_decay else None,
        perceptual=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), seen)
        if options.perceptual_weight
        else None,
        discriminator=_discriminator(options, jax.random.fold_in(init_key, 1)) if judged else None,
    )


def _discriminator(options: AutoencoderOptions, key: jax.Array) -> DiscriminatorState:
    params = discriminator.init_params(options.discriminator_config(), key)
    opt_state = _discriminator_optimizer(options).init(params)
    return DiscriminatorState(params, opt_state, adversarial.init_lecam())


def complete(state: AutoencoderState) -> Any:
    """The parameters of a state, with the codebook, for `autoencoder.bind`."""
    if state.codebook is None:
        return state.params
    return {**state.params, "quantize": {"embedding": state.codebook.codebook}}


def result(state: AutoencoderState) -> Any:
    """Complete parameters to use: the averaged ones, if there are any."""
    averaged = getattr(state, "averaged", None)
    return complete(state) if averaged is None else averaged


def _unchanged(tree: Any) -> Any:
    return tree


class _Coded(NamedTuple):
    """Latents [B, h, w, E] of a batch, and their codes [B, h, w]."""

    latents: jax.Array
    codes: jax.Array


def _forward(params, codebook, pixels, key, step, *, config, options, whole):
    """(Reconstructions, weighted loss of the latents), (that loss without its weight, coded)."""
    dtype = jnp.dtype(options.dtype)
    if dtype != jnp.float32:
        # Kernels are cast before they are gathered; scales and biases stay as they are.
        params = jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params)
    params = whole(params)
    if codebook is None:
        codebook = params["quantize"]["embedding"].astype(jnp.float32)
    else:
        params = {**params, "quantize": {"embedding": codebook}}
    if options.decoder_only:
        params = {
            name: part if name in autoencoder.DECODER else jax.lax.stop_gradient(part)
            for name, part in params.items()
        }
    model = autoencoder.bind(config, params)
    z = model.encode(pixels.astype(dtype))
    if options.decoder_only:
        z = z.astype(jnp.float32)
        codes = model.quantize.codes(z, None)
        decoded = quantizer.lookup(codes, codebook)
        loss, weight = jnp.mean((z - decoded) ** 2), 0.0
    elif config.quantizer == "gumbel":
        temperature = quantizer.gumbel_temperature(step, options.temperature_steps)
        quantised, loss, codes = quantizer.gumbel_quantize(
            model.quantize.proj(z), codebook, key, temperature=temperature
        )
        weight, decoded = options.kl_weight, quantised
    else:
        z = z.astype(jnp.float32)
        codes = quantizer.nearest_codes(z, codebook)
        quantised = quantizer.lookup(codes, codebook)
        decoded = z + jax.lax.stop_gradient(quantised - z)
        loss = jnp.mean((z - jax.lax.stop_gradient(quantised)) ** 2)
        weight = options.commitment
    made = model.decode_latents(decoded.astype(dtype)).astype(jnp.float32)
    return (made, weight * loss), (loss, _Coded(z, codes))


def _decibels(mean_squared_error):
    """The PSNR of an error of values in [-1, 1], whose peak-to-peak amplitude is 2."""
    return 10.0 * jnp.log10(4.0 / jnp.maximum(mean_squared_error, 1e-10))


def _image_losses(made, pixels, seen, options):
    """The losses of the picture that need no discriminator, and metrics."""
    error = made - pixels
    squared = jnp.mean(error**2)
    weight = options.squared_weight
    reconstruction = (1.0 - weight) * jnp.mean(jnp.abs(error)) + weight * squared
    metrics = {"reconstruction": reconstruction, "psnr": _decibels(squared)}
    if not options.perceptual_weight:
        return reconstruction, metrics
    distance = perceptual.distance(seen, made, pixels, config=options.perceptual_config())
    metrics["perceptual"] = jnp.mean(distance)
    return reconstruction + options.perceptual_weight * metrics["perceptual"], metrics


class _Judgement(NamedTuple):
    """What the discriminator says of a batch.

    Attributes:
        loss: the autoencoder's, float32 scalar, and `by_image`, its gradient by the pictures.
        gradients: of the discriminator's own loss, by its parameters.
        metrics: float32 scalars.
    """

    loss: jax.Array
    by_image: jax.Array
    gradients: Any
    metrics: dict[str, jax.Array]


def _judge(state: DiscriminatorState, made, pixels, options, whole) -> _Judgement:
    """Both networks' adversarial gradients, from one pass of the discriminator.

    Metrics: `adversarial` (the autoencoder's loss), `discriminator_loss` (hinge), `lecam`,
    `logits_real`, `logits_fake`, `discriminator_accuracy` (share of patches told right). All are 0
    before `adversarial_start`.
    """
    sizes = options.discriminator_config()

    def losses(params, made):
        judge = discriminator.bind(sizes, whole(params))
        real, fake = judge(pixels), judge(made)
        hinge = adversarial.discriminator_hinge(real, fake)
        held = adversarial.lecam(state.lecam, real, fake)
        own = hinge + options.lecam_weight * held
        return (adversarial.generator_hinge(fake), own), (hinge, held, real, fake)

    (loss, _), pull, found = jax.vjp(losses, state.params, made, has_aux=True)
    hinge, held, real, fake = found
    one, zero = jnp.ones(()), jnp.zeros(())
    return _Judgement(
        loss,
        # What a pullback computes beside what is taken of it, the compiler leaves out.
        by_image=pull((one, zero))[1],
        gradients=pull((zero, one))[0],
        metrics={
            "adversarial": loss,
            "discriminator_loss": hinge,
            "lecam": held,
            "logits_real": jnp.mean(real),
            "logits_fake": jnp.mean(fake),
            "discriminator_accuracy": 0.5 * (jnp.mean(real > 0) + jnp.mean(fake < 0)),
        },
    )


def _judge_from_start(share, state, made, pixels, options, whole) -> _Judgement:
    """Nothing is computed, and all is zero, where the share of the adversarial loss is 0."""

    def compute(state, made, pixels):
        return _judge(state, made, pixels, options, whole)

    if not options.adversarial_start:
        # On a CPU, a convolution takes several times as long within a condition.
        return compute(state, made, pixels)
    shapes = jax.eval_shape(compute, state, made, pixels)

    def nothing(*_):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    return jax.lax.cond(share > 0, compute, nothing, state, made, pixels)


# What ``remat`` keeps for the backward pass: the outputs of the blocks.
_BLOCKS = jax.checkpoint_policies.save_only_these_names(autoencoder.BLOCK)


def _gradients(carried, key, images, *, state, config, options, whole):
    """Gradients of all networks on some rows of a batch, their latents and codes, and metrics."""
    pixels = autoencoder.from_pixels(images)
    codebook = None if state.codebook is None else state.codebook.codebook

    def forward(params):
        return _forward(
            params, codebook, pixels, key, state.step, config=config, options=options, whole=whole
        )

    if options.remat == "full":
        forward = jax.checkpoint(forward, policy=_BLOCKS)
    (made, of_latents), pull, (latent_loss, coded) = jax.vjp(forward, state.params, has_aux=True)
    losses = functools.partial(
        _image_losses, pixels=pixels, seen=getattr(state, "perceptual", None), options=options
    )
    (loss, metrics), by_image = jax.value_and_grad(losses, has_aux=True)(made)
    loss += of_latents
    gradients = {}
    if options.adversarial_weight:
        share = adversarial.adversarial_share(
            state.step, options.adversarial_start, options.adversarial_warmup
        )
        found = _judge_from_start(share, state.discriminator, made, pixels, options, whole)
        weight = options.adversarial_weight * share
        if options.adaptive_weight:

            def last(by_image):
                return pull((by_image, jnp.zeros(())))[0]["decoder"]["conv_out"]["kernel"]

            weight *= adversarial.adaptive_weight(last(by_image), last(found.by_image))
        by_image += weight * found.by_image
        loss += weight * found.loss
        gradients["discriminator"] = found.gradients
        metrics |= found.metrics | {"adversarial_weight": weight}
    gradients["autoencoder"] = pull((by_image, jnp.ones(())))[0]
    name = "kl" if config.quantizer == "gumbel" else "commitment"
    metrics |= {"loss": loss, name: latent_loss}
    return gradients, _kept(carried, coded), metrics


def _kept(carried, coded: _Coded):
    """``coded`` of one part among all: ``carried`` is (its number, arrays [A, B/A, ...])."""
    if carried is None:
        return coded
    part, arrays = carried
    return part + 1, jax.tree.map(lambda all_, one: all_.at[part].set(one), arrays, coded)


def _none_kept(images, config, parts: int):
    if parts == 1:
        return None
    grid, rows = (config.grid_size, config.grid_size), images.shape[0] // parts
    shapes = _Coded((parts, rows, *grid, config.codebook_dim), (parts, rows, *grid))
    return jnp.zeros((), jnp.int32), _Coded(
        jnp.zeros(shapes.latents), jnp.zeros(shapes.codes, jnp.int32)
    )


def _of_batch(carried) -> _Coded:
    """The latents and codes of all parts, in the order of the batch's rows."""
    if isinstance(carried, _Coded):
        return carried
    # Part a has the rows a, a + A, ...: see ``task.accumulate``.
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), carried[1])


def train_step(
    state: AutoencoderState,
    images: jax.Array,
    *,
    config: AutoencoderConfig,
    options: AutoencoderOptions,
    whole: Callable[[Any], Any] = _unchanged,
) -> tuple[AutoencoderState, dict[str, jax.Array]]:
    """One step of Adam for both networks, of the codebook's average and of those of the weights.

    Args:
        state: `AutoencoderState`.
        images: uint8 [B, S, S, 3].
        config: `autoencoder.AutoencoderConfig`.
        options: `options.AutoencoderOptions`.
        whole: gathers parameters that are divided over devices.

    Returns:
        The next state and a dict of float32 scalars: `loss`, `reconstruction`, `commitment` (`kl`
        of a Gumbel quantiser), `psnr` (dB, of the batch before clipping to [-1, 1]), `perplexity`
        and `codes_used` (of the batch's codes), `gradient_norm` (before clipping) and
        `learning_rate`; where there is such a term, `perceptual` and the metrics of `_judge`, with
        `adversarial_weight`, what the loss was multiplied by, and `discriminator_gradient_norm`.
    """
    chex.assert_type(images, jnp.uint8)
    key = jax.random.fold_in(state.key, state.step)
    compute = functools.partial(
        _gradients, state=state, config=config, options=options, whole=whole
    )
    parts = options.gradient_accumulation
    gradients, carried, metrics = task_lib.accumulate(
        compute, _none_kept(images, config, parts), key, images, parts
    )
    z, codes = _of_batch(carried)
    transform, rate = _optimizer(options)
    updates, opt_state = transform.update(gradients["autoencoder"], state.opt_state, state.params)
    perplexity, codes_used = quantizer.code_usage(codes, config.num_codes)
    metrics |= {
        "perplexity": perplexity,
        "codes_used": codes_used,
        "gradient_norm": optax.tree.norm(gradients["autoencoder"]),
        "learning_rate": rate(state.step),
    }
    following = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        codebook=_updated_codebook(state.codebook, z, codes, key, options),
        opt_state=opt_state,
    )
    if options.adversarial_weight:
        metrics["discriminator_gradient_norm"] = optax.tree.norm(gradients["discriminator"])
        learnt = _updated_discriminator(state, gradients["discriminator"], metrics, options)
        following = following.replace(discriminator=learnt)
    if options.ema_decay:
        averaged = optimizer.averaged(
            state.averaged, complete(following), options.ema_decay, state.step
        )
        following = following.replace(averaged=averaged)
    return following, metrics


def _updated_codebook(codebook, z, codes, key, options) -> quantizer.CodebookState | None:
    if codebook is None or options.decoder_only:
        return codebook
    return quantizer.update_codebook(
        codebook,
        z,
        codes,
        key=key,
        decay=options.codebook_decay,
        revival_threshold=options.revival_threshold,
    )


def _updated_discriminator(state, gradients, metrics, options) -> DiscriminatorState:
    """The discriminator after this step; before ``adversarial_start``, it is as it was."""
    old = state.discriminator
    updates, opt_state = _discriminator_optimizer(options).update(
        gradients, old.opt_state, old.params
    )
    lecam = adversarial.update_lecam(
        old.lecam, metrics["logits_real"], metrics["logits_fake"], options.lecam_decay
    )
    new = DiscriminatorState(optax.apply_updates(old.params, updates), opt_state, lecam)
    learns = state.step >= options.adversarial_start
    return jax.tree.map(lambda n, o: jnp.where(learns, n, o), new, old)


def reconstruct(
    params: Any, images: jax.Array, *, config: AutoencoderConfig
) -> tuple[jax.Array, jax.Array]:
    """Images through the codes and back.

    Args:
        params: complete parameters; see `result`.
        images: uint8 [B, S, S, 3].
        config: `autoencoder.AutoencoderConfig`.

    Returns:
        The reconstructions, uint8 [B, S, S, 3], and the codes, int32 [B, N].
    """
    codes = autoencoder.encode(params, images, config=config)
    return autoencoder.decode(params, codes, config=config), codes
