"""Stage one: trains the autoencoder of a run, or takes the one that the config names.

Either way it ends as the model folder ``workdir/autoencoder/model``, so that a workdir has all that
sampling needs.

The loss is that of van den Oord et al., "Neural Discrete Representation Learning" (2017), with a
moving-average codebook. With z the encoder's output and e the code nearest to it:

    reconstruction(x, decode(z + sg(e - z))) + commitment * |z - sg(e)|^2

The gradient of the decoder's input goes straight through to z. A published VQGAN adds a perceptual
and an adversarial term; both need networks that cost many times this one.

Letters: B batch, S image side in pixels, N image tokens, K codes, E codebook dimension.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import chex
import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax.data import batches, encode, images, sets
from vqd_jax.data.bad_records import CheckedReader
from vqd_jax.errors import UserError
from vqd_jax.interop import folder, pretrained
from vqd_jax.models import autoencoder, quantizer
from vqd_jax.options import AutoencoderOptions
from vqd_jax.parallel import processes, sharding
from vqd_jax.training import loop, optimizer
from vqd_jax.training.task import Task


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


def _optimizer(options: AutoencoderOptions) -> tuple[optax.GradientTransformation, optax.Schedule]:
    rate = optimizer.learning_rate(options.learning_rate, options.warmup_steps, options.num_steps)
    adam = optax.adam(rate, b1=0.9, b2=0.99)
    return optax.chain(optax.clip_by_global_norm(1.0), adam), rate


def create_state(config, options, key):
    """The state before the first step; wrap in `jax.jit` to build it in one compiled call.

    Args:
        config: `autoencoder.AutoencoderConfig`.
        options: `options.AutoencoderOptions`.
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
        opt_state=_optimizer(options)[0].init(params),
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

    Args:
        state: `AutoencoderState`.
        images: uint8 [B, S, S, 3].
        config: `autoencoder.AutoencoderConfig`.
        options: `options.AutoencoderOptions`.

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
    transform, rate = _optimizer(options)
    updates, opt_state = transform.update(gradients, state.opt_state, state.params)
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
        "learning_rate": rate(state.step),
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


class AutoencoderTask(Task):
    """Stage one of a config.

    Args:
      config: the resolved config.
      dataset: batches ``{'image': uint8 [B, S, S, 3]}``.
    """

    name = prefix = "autoencoder"

    def __init__(self, config: ConfigDict, dataset: grain.IterDataset):
        self.batches = dataset
        self._seed = config.seed
        self._sizes = config_lib.autoencoder_config(config)
        self._options = config_lib.autoencoder_options(config)

    def create_state(self):
        # Another stream of random numbers than that of stage two.
        key = jax.random.fold_in(jax.random.key(self._seed), 1)
        return create_state(self._sizes, self._options, key)

    def train_step(self, state, batch, placement):
        return train_step(state, batch["image"], config=self._sizes, options=self._options)


def check(config: ConfigDict, workdir: str) -> None:
    """Raises ``UserError`` if there is no autoencoder and the config's cannot be trained here."""
    c = config.autoencoder
    found = pretrained.find_autoencoder(config, workdir)
    if found is not None:
        folder.load_config(found)
    elif c.quantizer != "nearest" or c.codebook_size:
        raise UserError(
            f"config.autoencoder.quantizer={c.quantizer!r} with codebook_size={c.codebook_size} is "
            "of converted autoencoders: give one with --config.autoencoder.path (docs/weights.md), "
            "or train one with quantizer=nearest and codebook_size=0"
        )


def prepare(config: ConfigDict, workdir: str, builder) -> Any:
    """The autoencoder's parameters: from the workdir, from ``config.autoencoder.path``, or trained.

    Args:
      config: the resolved config.
      workdir: of the run.
      builder: the prepared data set; its train split is learnt from.
    """
    target = pretrained.model_folder(workdir)
    found = pretrained.find_autoencoder(config, workdir)
    if found == target:
        return pretrained.load_autoencoder(config, target)
    if found is not None:
        params = pretrained.load_autoencoder(config, found)
    else:
        params = _train(config, str(Path(workdir) / "autoencoder"), builder)
    # No process may take what is written here for what was there before.
    processes.barrier("autoencoder is there")
    if processes.is_writer():
        folder.save(target, dataclasses.asdict(config_lib.autoencoder_config(config)), params)
    return params


def _train(config: ConfigDict, directory: str, builder) -> Any:
    c, mesh = config.autoencoder, sharding.make_mesh(config)
    sharding.require_divisible("autoencoder.batch_size", c.batch_size, mesh)
    dataset = batches.image_dataset(
        batches.records(builder, encode.TRAIN, decode=False),
        encode.crop(config, encode.TRAIN),
        c.batch_size // jax.process_count(),
        config.seed,
        config.data.max_bad_share,
        bad_log=f"{directory}/bad_records.jsonl",
    )
    schedule = loop.Schedule.of(
        config, num_steps=c.num_steps, batch_size=c.batch_size, steps_per_call=1, profile_steps=0
    )
    place = loop.Place(directory, f"{directory}/checkpoints", mesh, config)
    state = loop.fit(AutoencoderTask(config, dataset), schedule, place)
    params, codebook = jax.tree.map(np.asarray, (state.params, state.codebook.codebook))
    if processes.is_writer():
        _report(params, codebook, config, builder, directory)
    return with_codebook(params, codebook)


def _report(params, codebook, config, builder, directory: str) -> None:
    """Logs the PSNR on validation pictures and draws some beside their reconstructions."""
    sizes, split = config_lib.autoencoder_config(config), sets.evaluation_split(builder)
    read = CheckedReader(batches.records(builder, split), 1.0, needs_captions=False)
    records = [
        r
        for r in map(read, range(min(64, builder.info.splits[split].num_examples)))
        if r is not None
    ]
    crops = np.stack([images.center_crop(r["image"], sizes.image_size) for r in records])
    evaluate = jax.jit(functools.partial(eval_reconstruction, config=sizes))
    result = evaluate(params, codebook, crops)
    psnr, used = float(result["psnr"].mean()), int(result["codes_used"])
    path = f"{directory}/reconstructions.png"
    logging.info(
        "autoencoder: %.2f dB PSNR on %d validation pictures, which use %d of %d codes; see %s",
        psnr, len(crops), used, sizes.num_codes, path,
    )  # fmt: skip
    shown = crops[:8], np.asarray(result["images"])[:8]
    images.save(path, images.grid(np.stack(shown), ["pictures", "from their codes"]))
