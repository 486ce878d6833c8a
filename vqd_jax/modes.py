"""The tasks of the command line, one function a mode."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from vqd_jax import bulk, pictures
from vqd_jax import config as config_lib
from vqd_jax.data import images
from vqd_jax.errors import UserError
from vqd_jax.parallel import program, sharding
from vqd_jax.pipeline import Generation, VQDiffusion
from vqd_jax.training import stage_one, stage_two
from vqd_jax.training import state as state_lib
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
    model_dir: str,
    prompts: Sequence[str] | None,
    *,
    config: ConfigDict | None,
    output: str | None,
    animate: bool,
    image: str | None,
    mask: str | None,
    strength: float,
    num_images: int | None,
    seed: int,
    **options,
) -> None:
    """Writes ``grid_seed<seed>.png``, single pictures and, if asked for, animations.

    Args:
      model_dir: a model folder, or the workdir of a training run.
      prompts: texts or class labels; an empty one is unconditional.
      config: its ``sampling`` part replaces that of the run; None keeps the run's.
      output: folder; None is ``model_dir/samples``.
      animate: write the denoising of every picture too.
      image: file of a picture to begin from; None begins from nothing.
      mask: file of a mask of the same size, white where to paint; None edits the whole picture.
      strength: of the noise, where a picture is edited as a whole.
      num_images: of every prompt; None is 4.
      seed: decides the pictures.
      **options: of ``VQDiffusion.generate``.
    """
    num_images = 4 if num_images is None else num_images
    model = VQDiffusion.from_pretrained(model_dir)
    if model.config.denoiser.condition == "none":
        prompts = prompts or [""]
    if not prompts:
        raise UserError(
            'give at least one --prompt="..." (an empty one, --prompt=, is unconditional)'
        )
    if config is not None:
        changed = config_lib.differences(model.config, config)
        if changed:
            raise UserError(f"{model_dir} was made with another config ({'; '.join(changed)})")
        model.config.sampling = config.sampling
    if image is None and mask is not None:
        raise UserError("--mask needs the picture that it belongs to: --image=FILE")
    folder = Path(output or Path(model_dir) / "samples")
    folder.mkdir(parents=True, exist_ok=True)
    logging.info("sampling %d pictures of %d prompts", num_images, len(prompts))
    options |= {"num_images": num_images, "seed": seed, "trajectory": animate}
    if image is None:
        made = model.generate(prompts, **options)
    else:
        if len(prompts) > 1:
            raise UserError("--image takes one --prompt")
        picture, where = _open(image), None if mask is None else _open(mask)
        if where is None:
            made = model.edit(picture, prompts[0], strength=strength, **options)
        else:
            made = model.inpaint(picture, where, prompts[0], **options)
    for i, prompt in enumerate(prompts):
        for j, pixels in enumerate(made.pixels[i]):
            name = folder / f"{i:03d}_{_slug(prompt)}_seed{seed}_{j:02d}"
            pictures.save(f"{name}.png", pictures.Image.fromarray(pixels))
            if animate:
                pictures.save_animation(f"{name}.gif", _frames(model, made, i, j))
    path = folder / f"grid_seed{seed}.png"
    pictures.save(path, pictures.grid(made.pixels, prompts))
    logging.info("wrote %s and %d single pictures beside it", path, len(made.images))


def sample_file(
    model_dir: str,
    prompts_file: str,
    *,
    config: ConfigDict | None,
    output: str | None,
    num_images: int | None,
    format: str,
    **options,
) -> None:
    """Writes pictures of all prompts of a file, on all devices; see ``bulk.sample``.

    Args:
      model_dir: a model folder, or the workdir of a training run.
      prompts_file: a text or a class label a line.
      config: its ``mesh`` says how this process's devices share the work; None spreads the images.
      output: folder; None is ``model_dir/samples_<name of the file>``.
      num_images: of all prompts together; None is one each.
      format: "png" or "array_record".
      **options: of ``VQDiffusion.generate``.
    """
    prompts = bulk.read_prompts(prompts_file)
    model = VQDiffusion.from_pretrained(model_dir)
    mesh = sharding.make_mesh(config or model.config, jax.local_devices())
    bulk.sample(
        model,
        prompts,
        output or str(Path(model_dir) / f"samples_{Path(prompts_file).stem}"),
        num_images=len(prompts) if num_images is None else num_images,
        mesh=mesh,
        format=format,
        **options,
    )


def _open(path: str) -> Image.Image:
    try:
        return Image.fromarray(images.decode(Path(path).read_bytes()))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a picture: {error}") from error


def plan(config: ConfigDict, topology: str | None = None, hbm_gib: float | None = None) -> None:
    """Prints what the training of ``config`` takes of every device, without allocating it.

    Args:
      config: the resolved config.
      topology: devices that need not be there, see ``program.topology``; None is all devices here.
      hbm_gib: memory of one device, GiB; None is what is known of its kind.

    Raises:
      UserError: the mesh, the batch or the step does not fit the devices, or the compiler for them
        is missing.
    """
    devices = jax.devices() if topology is None else program.topology(topology)
    c, mesh = config.training, sharding.make_mesh(config, devices)
    sharding.require_divisible("training.batch_size", c.batch_size, mesh, c.gradient_accumulation)
    logging.info("compiling the train step for %d x %s", len(devices), devices[0].device_kind)
    state = state_lib.abstract_state(config, mesh)
    made = program.plan(state, state_lib.lower_train_step(config, mesh), mesh)
    hbm_gib = program.hbm_of(devices[0]) if hbm_gib is None else hbm_gib
    print(program.describe(made, mesh, hbm_gib))


def export(model_dir: str, target: str, format: str) -> None:
    """Writes a model in the layout of another program; see ``VQDiffusion.save_pretrained``."""
    VQDiffusion.from_pretrained(model_dir).save_pretrained(target, format=format)
    logging.info("wrote %s", target)


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
    frames = model.decode_codes(np.where(hidden, tokens[-1], tokens))
    start = np.full_like(frames[:1], 160)
    shown = [
        pictures.masked(frame, mask.reshape(side, side))
        for frame, mask in zip(frames, hidden, strict=True)
    ]
    return [pictures.Image.fromarray(pictures.enlarge(f)) for f in [*start, *shown]]
