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
from vqd_jax import pictures
from vqd_jax.data import images, pipeline
from vqd_jax.errors import UserError
from vqd_jax.interop import folder
from vqd_jax.models import autoencoder
from vqd_jax.training import autoencoder as training
from vqd_jax.training import loop


def model_folder(workdir: str) -> str:
    """Where a workdir keeps its autoencoder."""
    return str(Path(workdir) / "autoencoder" / "model")


def load(config: ConfigDict, directory: str) -> Any:
    """Parameters of the autoencoder in a model folder.

    Raises:
      UserError: it cannot be read, or has other sizes than ``config.autoencoder`` says.
    """
    wanted = config_lib.autoencoder_config(config)
    found = folder.load_config(directory)
    for field, value in dataclasses.asdict(wanted).items():
        stored = found.get(field)
        if (list(value) if isinstance(value, tuple) else value) != stored:
            key = "data.image_size" if field == "image_size" else f"autoencoder.{field}"
            raise UserError(
                f"the autoencoder in {directory} has {field}={stored}, but config.{key}={value}; "
                "set the config to what the autoencoder has"
            )
    abstract = jax.eval_shape(lambda: autoencoder.init_params(wanted, jax.random.key(0)))
    return folder.load_params(directory, abstract)


def prepare(config: ConfigDict, workdir: str, builder) -> Any:
    """The autoencoder's parameters: from the workdir, from ``config.autoencoder.path``, or trained.

    Args:
      config: the resolved config.
      workdir: of the run.
      builder: the prepared data set, whose train split is learnt from.
    """
    target = model_folder(workdir)
    if (Path(target) / "config.json").exists():
        return load(config, target)
    sizes = dataclasses.asdict(config_lib.autoencoder_config(config))
    if config.autoencoder.path:
        given = config.autoencoder.path
        # A workdir will do as well as the model folder in it.
        is_workdir = (Path(given) / "autoencoder").exists()
        params = load(config, model_folder(given) if is_workdir else given)
        folder.save(target, sizes, params)
        return params
    params = _train(config, str(Path(workdir) / "autoencoder"), builder)
    folder.save(target, sizes, params)
    return params


def _train(config: ConfigDict, directory: str, builder) -> Any:
    sizes, options = config_lib.autoencoder_config(config), config_lib.autoencoder_options(config)
    dataset = pipeline.image_dataset(
        pipeline.records(builder, "train", decode=False),
        sizes.image_size,
        config.autoencoder.batch_size,
        config.seed,
        train=True,
        max_bad_share=config.data.max_bad_share,
    )
    step = jax.jit(
        functools.partial(training.train_step, config=sizes, options=options), donate_argnums=0
    )
    state = loop.fit(
        "autoencoder",
        functools.partial(training.create_state, sizes, options, _key(config)),
        lambda state, batch: step(state, batch["image"]),
        dataset,
        directory=directory,
        prefix="autoencoder",
        config=config,
        num_steps=config.autoencoder.num_steps,
        batch_size=config.autoencoder.batch_size,
        log_every=config.training.log_every,
        save_every=config.training.save_every,
        keep_checkpoints=config.training.keep_checkpoints,
    )
    _report(state, sizes, builder, directory)
    return jax.tree.map(np.asarray, training.with_codebook(state.params, state.codebook.codebook))


def _key(config: ConfigDict) -> jax.Array:
    """Stage one draws from another stream than stage two."""
    return jax.random.fold_in(jax.random.key(config.seed), 1)


def _report(state, sizes, builder, directory: str) -> None:
    """Logs the PSNR on validation pictures and draws some beside their reconstructions."""
    read = pipeline.CheckedReader(pipeline.records(builder, "validation"), 1.0)
    records = [
        r
        for r in map(read, range(min(64, builder.info.splits["validation"].num_examples)))
        if r is not None
    ]
    crops = np.stack([images.center_crop(r["image"], sizes.image_size) for r in records])
    evaluate = jax.jit(functools.partial(training.eval_reconstruction, config=sizes))
    result = evaluate(state.params, state.codebook.codebook, crops)
    psnr, used = float(result["psnr"].mean()), int(result["codes_used"])
    path = f"{directory}/reconstructions.png"
    logging.info(
        "autoencoder: %.2f dB PSNR on %d validation pictures, which use %d of %d codes; see %s",
        psnr, len(crops), used, sizes.num_codes, path,
    )  # fmt: skip
    shown = crops[:8], np.asarray(result["images"])[:8]
    pictures.save(path, pictures.grid(np.stack(shown), ["pictures", "from their codes"]))
