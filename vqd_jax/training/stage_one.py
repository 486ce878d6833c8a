"""Stage one: trains the autoencoder of a run, or takes the one that the config names.

Either way it ends as the model folder ``workdir/autoencoder/model``, so that a workdir has all that
sampling needs. ``tokenizer`` has the step and the losses.

Letters: B batch, S image side in pixels, K codes, F entries of the codebook.
"""

import dataclasses
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax.data import batches, encode
from vqd_jax.data.bad_records import CheckedReader
from vqd_jax.errors import UserError
from vqd_jax.interop import folder, perceptual_files, pretrained
from vqd_jax.models import autoencoder, quantizer
from vqd_jax.parallel import processes, rows, sharding
from vqd_jax.training import loop, tokenizer
from vqd_jax.training.metrics import progress_bar
from vqd_jax.training.task import Task
from vqd_jax.training.validation import Validation


class AutoencoderTask(Task):
    """Stage one of a config.

    Args:
      config: the resolved config.
      mesh: the devices of all processes.
      dataset: batches ``{'image': uint8 [B, S, S, 3]}``; None if none is trained on.
      validation: what is measured on the way; None is nothing.
    """

    name = prefix = "autoencoder"

    def __init__(
        self,
        config: ConfigDict,
        mesh: Mesh,
        dataset: grain.IterDataset | None = None,
        validation: Validation | None = None,
    ):
        self.batches = dataset
        self._config, self._mesh, self._validation = config, mesh, validation
        self._sizes = config_lib.autoencoder_config(config)
        self._options = config_lib.autoencoder_options(config)

    def create_state(self):
        # Another stream of random numbers than that of stage two.
        key = jax.random.fold_in(jax.random.key(self._config.seed), 1)
        return tokenizer.create_state(self._sizes, self._options, key)

    def train_step(self, state, batch, placement):
        return tokenizer.train_step(
            state,
            batch["image"],
            config=self._sizes,
            options=self._options,
            whole=sharding.gathering(self._mesh),
        )

    def shardings(self, abstract, mesh):
        return sharding.shardings(abstract, mesh, sharding.AUTOENCODER_RULES)

    def begin(self, state):
        c = self._options
        if c.perceptual_weight:
            _, seen = perceptual_files.load(c.perceptual, c.perceptual_path, seed=self._config.seed)
            state = state.replace(perceptual=sharding.put_like(state.perceptual, seen))
        if c.init_from:
            state = self._with_trained(state)
        return state

    def _with_trained(self, state):
        found = pretrained.load_initial_autoencoder(self._config)
        params = {name: part for name, part in found.items() if name in state.params}
        state = state.replace(params=sharding.put_like(state.params, params))
        if state.codebook is not None:
            embedding = np.asarray(found["quantize"]["embedding"])
            # As if every code had been chosen by an even share of the latents of a batch.
            share = self._options.batch_size * self._sizes.num_tokens / len(embedding)
            size = np.full(len(embedding), share, np.float32)
            codebook = quantizer.CodebookState(embedding, size, embedding * np.float32(share))
            state = state.replace(codebook=sharding.put_like(state.codebook, codebook))
        if self._options.ema_decay:
            state = state.replace(averaged=sharding.put_like(state.averaged, found))
        return state

    def evaluate(self, step, state, writer):
        if self._validation:
            is_last = step == self._options.num_steps
            seen = getattr(state, "perceptual", None)
            self._validation.run(step, tokenizer.result(state), seen, writer, is_last=is_last)


def abstract_batch(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and place on the mesh of one batch of pictures."""
    side = config.data.image_size
    shape, placed = (config.autoencoder.batch_size, side, side, 3), sharding.batch_sharding(mesh)
    return {"image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=placed)}


def check(config: ConfigDict, workdir: str) -> None:
    """Raises ``UserError`` if there is no autoencoder and the config's cannot be trained here."""
    c = config.autoencoder
    found = pretrained.find_autoencoder(config, workdir)
    if found is not None:
        folder.load_config(found)
    elif c.codebook_size:
        raise UserError(
            f"config.autoencoder.codebook_size={c.codebook_size} is of autoencoders with a remap: "
            "give one with --config.autoencoder.path (docs/weights.md), or train one with "
            f"--config.autoencoder.codebook_size=0 --config.autoencoder.num_codes={c.codebook_size}"
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
    sharding.require_divisible(
        "autoencoder.batch_size", c.batch_size, mesh, c.gradient_accumulation
    )
    dataset = batches.image_dataset(
        batches.records(builder, encode.TRAIN, decode=False),
        encode.crop(config, encode.TRAIN),
        c.batch_size // jax.process_count(),
        config.seed,
        config.data.max_bad_share,
        record_weights=encode.record_weights(config, builder),
        bad_log=f"{directory}/bad_records.jsonl",
    )
    schedule = loop.Schedule.of(
        config,
        num_steps=c.num_steps,
        batch_size=c.batch_size,
        steps_per_call=c.steps_per_call,
        profile_steps=c.profile_steps,
    )
    place = loop.Place(directory, f"{directory}/checkpoints", mesh, config)
    task = AutoencoderTask(config, mesh, dataset, Validation(config, builder, directory, mesh))
    state = loop.fit(task, schedule, place)
    return sharding.fetch(tokenizer.result(state))


def remap(config: ConfigDict, workdir: str, builder) -> None:
    """Leaves out the codes that no training picture has: ``workdir/autoencoder/model_remapped``.

    A denoiser of fewer codes is easier to train. The folder is not written if all codes are used,
    or if the autoencoder has a remap.

    Args:
      config: the resolved config.
      workdir: of a run whose autoencoder is there.
      builder: the prepared data set.
    """
    sizes = config_lib.autoencoder_config(config)
    target = Path(workdir) / "autoencoder" / "model_remapped"
    if not processes.is_writer() or sizes.codebook_size is not None or target.exists():
        return
    params = pretrained.load_autoencoder(config, pretrained.model_folder(workdir))
    ids = quantizer.build_remap(_uses(config, sizes, params, builder))
    if ids.max() == sizes.num_codes - 1:
        logging.info("the training pictures use all %d codes", sizes.num_codes)
        return
    sizes, params = autoencoder.with_remap(sizes, params, ids)
    folder.save(target, dataclasses.asdict(sizes), params)
    logging.info(
        "the training pictures use %d of %d codes; %s has these alone: use it with "
        "--config.autoencoder.path=%s --config.autoencoder.num_codes=%d "
        "--config.autoencoder.codebook_size=%d",
        int(np.count_nonzero(ids)), sizes.codebook_size, target, target, sizes.num_codes,
        sizes.codebook_size,
    )  # fmt: skip


def _uses(config, sizes, params, builder) -> np.ndarray:
    """How often the crops of the training pictures have each code, int64 [K]."""
    codec, crop = encode.Codec(sizes, params), encode.crop(config, encode.TRAIN)
    read = CheckedReader(
        batches.records(builder, encode.TRAIN, decode=False), 1.0, needs_captions=False
    )
    count = builder.info.splits[encode.TRAIN].num_examples
    uses, size = np.zeros(sizes.num_codes, np.int64), codec.batch_size
    with progress_bar("counting codes", count, unit="picture") as bar:
        for start in range(0, count, size):
            numbers = range(start, min(start + size, count))
            crops = [crop(r, config.seed, i) for i in numbers if (r := read(i)) is not None]
            if crops:
                codes = np.asarray(codec.encode(rows.padded(np.stack(crops), size)))[: len(crops)]
                uses += np.bincount(codes.reshape(-1), minlength=sizes.num_codes)
            bar.update(len(numbers))
    return uses
