"""Stage one: trains the autoencoder of a run, or takes the one that the config names.

Either way it ends as the model folder ``workdir/autoencoder/model``, so that a workdir has all that
sampling needs.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax.data import batches, encode, images, sets
from vqd_jax.data.bad_records import CheckedReader
from vqd_jax.errors import UserError
from vqd_jax.interop import folder, pretrained
from vqd_jax.parallel import processes, sharding
from vqd_jax.training import autoencoder as training
from vqd_jax.training import loop


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
      builder: the prepared data set, whose train split is learnt from.
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
    sizes, options = config_lib.autoencoder_config(config), config_lib.autoencoder_options(config)
    batch_size = config.autoencoder.batch_size
    mesh = sharding.make_mesh(config)
    sharding.require_divisible("autoencoder.batch_size", batch_size, mesh)
    dataset = batches.image_dataset(
        batches.records(builder, encode.TRAIN, decode=False),
        encode.crop(config, encode.TRAIN),
        batch_size // jax.process_count(),
        config.seed,
        config.data.max_bad_share,
        bad_log=f"{directory}/bad_records.jsonl",
    )
    whole = sharding.replicated(mesh)
    step = jax.jit(
        functools.partial(training.train_step, config=sizes, options=options),
        donate_argnums=0,
        in_shardings=(whole, sharding.batch_sharding(mesh)),
        out_shardings=whole,
    )
    state = loop.fit(
        "autoencoder",
        functools.partial(training.create_state, sizes, options, _key(config)),
        lambda state, batch: step(state, batch["image"]),
        dataset,
        directory=directory,
        prefix="autoencoder",
        config=config,
        mesh=mesh,
        placed=whole,
        num_steps=config.autoencoder.num_steps,
        batch_size=batch_size,
        log_every=config.training.log_every,
        save_every=config.training.save_every,
        keep_checkpoints=config.training.keep_checkpoints,
    )
    params, codebook = jax.tree.map(np.asarray, (state.params, state.codebook.codebook))
    if processes.is_writer():
        _report(params, codebook, sizes, builder, directory)
    return training.with_codebook(params, codebook)


def _key(config: ConfigDict) -> jax.Array:
    """Stage one draws from another stream than stage two."""
    return jax.random.fold_in(jax.random.key(config.seed), 1)


def _report(params, codebook, sizes, builder, directory: str) -> None:
    """Logs the PSNR on validation pictures and draws some beside their reconstructions."""
    split = sets.evaluation_split(builder)
    read = CheckedReader(batches.records(builder, split), 1.0, needs_captions=False)
    records = [
        r
        for r in map(read, range(min(64, builder.info.splits[split].num_examples)))
        if r is not None
    ]
    crops = np.stack([images.center_crop(r["image"], sizes.image_size) for r in records])
    evaluate = jax.jit(functools.partial(training.eval_reconstruction, config=sizes))
    result = evaluate(params, codebook, crops)
    psnr, used = float(result["psnr"].mean()), int(result["codes_used"])
    path = f"{directory}/reconstructions.png"
    logging.info(
        "autoencoder: %.2f dB PSNR on %d validation pictures, which use %d of %d codes; see %s",
        psnr, len(crops), used, sizes.num_codes, path,
    )  # fmt: skip
    shown = crops[:8], np.asarray(result["images"])[:8]
    images.save(path, images.grid(np.stack(shown), ["pictures", "from their codes"]))
