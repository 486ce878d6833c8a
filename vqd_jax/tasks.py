"""The tasks of the command line, one function a mode."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax import pictures
from vqd_jax.errors import UserError
from vqd_jax.pipeline import Generation, VQDiffusion
from vqd_jax.training import stage_one, stage_two
from vqd_jax.training.loop import Terminated

# 128 + SIGTERM, what a shell reports of a process that the signal ended.
TERMINATED_STATUS = 143


def train(config: ConfigDict, workdir: str) -> None:
    """Both stages; ends with likelihoods and a grid of pictures."""
    _exit_if_terminated(stage_two.train, config, workdir)


def train_autoencoder(config: ConfigDict, workdir: str) -> None:
    """Stage one alone; its result is ``workdir/autoencoder/model``."""
    _exit_if_terminated(stage_two.train_autoencoder, config, workdir)
    logging.info("the autoencoder of this run is %s", stage_one.model_folder(workdir))


def _exit_if_terminated(run, config, workdir) -> None:
    try:
        run(config, workdir)
    except Terminated as stopped:
        logging.warning("%s", stopped)
        sys.exit(TERMINATED_STATUS)


def sample(
    workdir: str,
    prompts: Sequence[str] | None,
    *,
    config: ConfigDict | None,
    output: str | None,
    animate: bool,
    seed: int,
    **options,
) -> None:
    """Writes ``grid_seed<seed>.png``, single pictures and, if asked for, animations.

    Args:
      workdir: of a training run.
      prompts: texts; an empty one is unconditional.
      config: its ``sampling`` part replaces that of the run; None keeps the run's.
      output: folder; None is ``workdir/samples``.
      animate: write the denoising of every picture too.
      seed: decides the pictures.
      **options: of ``VQDiffusion.generate``.
    """
    if not prompts:
        raise UserError(
            'give at least one --prompt="..." (an empty one, --prompt=, is unconditional)'
        )
    model = VQDiffusion.from_workdir(workdir)
    if config is not None:
        changed = config_lib.differences(model.config, config)
        if changed:
            raise UserError(f"{workdir} was made with another config ({'; '.join(changed)})")
        model.config.sampling = config.sampling
    folder = Path(output or Path(workdir) / "samples")
    folder.mkdir(parents=True, exist_ok=True)
    logging.info("sampling %d pictures of %d prompts", options["num_images"], len(prompts))
    made = model.generate(prompts, seed=seed, trajectory=animate, **options)
    for i, prompt in enumerate(prompts):
        for j, image in enumerate(made.images[i]):
            name = folder / f"{i:03d}_{_slug(prompt)}_seed{seed}_{j:02d}"
            pictures.save(f"{name}.png", pictures.Image.fromarray(image))
            if animate:
                pictures.save_animation(f"{name}.gif", _frames(model, made, i, j))
    path = folder / f"grid_seed{seed}.png"
    pictures.save(path, pictures.grid(made.images, prompts))
    logging.info("wrote %s and %d single pictures beside it", path, made.images[..., 0, 0, 0].size)


def _slug(prompt: str) -> str:
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:40] or "no-prompt"


def _frames(model: VQDiffusion, made: Generation, i: int, j: int) -> list:
    """The picture after every step; what is still masked is grey."""
    tokens = made.trajectory[:, i, j]
    num_codes = model.config.autoencoder.num_codes
    side = config_lib.autoencoder_config(model.config).grid_size
    hidden = tokens == num_codes
    # A masked place is decoded as the code that it gets in the end, so that its neighbours look
    # as they will; then it is covered.
    images = np.asarray(model.decode(np.where(hidden, tokens[-1], tokens)))
    start = np.full_like(images[:1], 160)
    shown = [
        pictures.masked(image, mask.reshape(side, side))
        for image, mask in zip(images, hidden, strict=True)
    ]
    return [pictures.Image.fromarray(pictures.enlarge(f)) for f in [*start, *shown]]
