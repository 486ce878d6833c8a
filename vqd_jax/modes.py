"""The tasks of the command line, one function a mode."""

import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging
from array_record.python import array_record_module
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from vqd_jax import config as config_lib
from vqd_jax.data import batches, codes, images, report
from vqd_jax.data import encode as encode_lib
from vqd_jax.errors import UserError
from vqd_jax.interop import pretrained
from vqd_jax.parallel import program, sharding
from vqd_jax.pipeline import Generation, VQDiffusion
from vqd_jax.training import stage_one, stage_two
from vqd_jax.training import task as task_lib
from vqd_jax.training.loop import Terminated
from vqd_jax.training.workdir import claim

# 128 + SIGTERM, what a shell reports of a process that the signal ended.
TERMINATED_STATUS = 143
# Pictures of ``sample_many`` in one file of records, or drawn before the next are written.
BLOCK = 256
FORMATS = ("png", "array_record")


def train(config: ConfigDict, workdir: str) -> None:
    """Both stages; ends with likelihoods and a grid of pictures."""
    _exit_if_terminated(stage_two.train, config, workdir)


def train_autoencoder(config: ConfigDict, workdir: str) -> None:
    """Stage one alone; its result is ``workdir/autoencoder/model``."""
    _exit_if_terminated(stage_two.train_autoencoder, config, workdir)
    logging.info("the autoencoder of this run is %s", pretrained.model_folder(workdir))


def _exit_if_terminated(run, config, workdir) -> None:
    try:
        run(config, workdir)
    except Terminated as stopped:
        logging.warning("%s", stopped)
        sys.exit(TERMINATED_STATUS)


def prepare(config: ConfigDict) -> None:
    """Makes the prepared data set of the config, or finds it made."""
    builder = encode_lib.data_set(config)
    sizes = ", ".join(f"{name} {s.num_examples:,}" for name, s in builder.info.splits.items())
    logging.info("%s in %s: %s", builder.info.full_name, builder.data_path, sizes)


def encode(config: ConfigDict, workdir: str) -> None:
    """Caches the codes of every split, in ``config.data.codes`` or ``workdir/codes``.

    The autoencoder is that of the workdir, or ``config.autoencoder.path``, or is trained. Every
    process takes its share of the shards; an interrupted encoding goes on where it was.
    """
    stage_one.check(config, workdir)
    with claim(config, workdir):
        builder = encode_lib.data_set(config)
        params = stage_one.prepare(config, workdir, builder)
        content = encode_lib.content(config, pretrained.text_features(config))
        where = encode_lib.directory(config, workdir)
        for split in builder.info.splits:
            encode_lib.make(config, where, builder, split, params, content)


def inspect(config: ConfigDict, workdir: str, *, num_samples: int = 32) -> None:
    """Writes ``training_stream.png`` and ``statistics.md`` into ``workdir/inspect``.

    The sheet has the first records of the training stream, crop beside reconstruction where the
    workdir (or ``config.autoencoder.path``) has an autoencoder, from the cache where there is one.

    Args:
      config: the resolved config.
      workdir: of a run, or a new folder.
      num_samples: records on the sheet.
    """
    folder = Path(workdir) / "inspect"
    folder.mkdir(parents=True, exist_ok=True)
    builder = encode_lib.data_set(config)
    content = encode_lib.content(config, pretrained.text_features(config))
    samples = _samples(config, workdir, builder, content, num_samples)
    if samples:
        sheet = folder / "training_stream.png"
        images.save(sheet, report.contact_sheet(samples))
        logging.info("the training stream: %s", sheet)
    found = {
        split: report.statistics(
            batches.records(builder, split, decode=False), content, description=f"reading {split}"
        )
        for split in builder.info.splits
    }
    page = folder / "statistics.md"
    text = report.page(builder.info.full_name, found, content)
    scratch = page.with_suffix(".tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(page)
    logging.info("what is in it: %s", page)


def _samples(config, workdir, builder, content, count) -> list[report.Sample]:
    source = batches.records(builder, encode_lib.TRAIN, decode=False)
    path = pretrained.find_autoencoder(config, workdir)
    params = pretrained.load_autoencoder(config, path) if path else None
    codec = encode_lib.Codec(config_lib.autoencoder_config(config), params) if path else None
    crop = encode_lib.crop(config, encode_lib.TRAIN)
    num_crops = encode_lib.num_crops(config, encode_lib.TRAIN)
    stream = {
        "count": count,
        "seed": config.seed,
        "null_text_rate": config.training.null_text_rate,
    }
    directory = encode_lib.directory(config, workdir)
    if codec is not None and (Path(directory) / encode_lib.TRAIN / codes.MANIFEST).exists():
        stored = encode_lib.open_split(config, directory, encode_lib.TRAIN, params, content)
        return report.cached_samples(stored, source, codec, crop, content, **stream)
    return report.source_samples(source, codec, crop, num_crops, content, **stream)


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
        picture = images.load(image)
        if mask is None:
            made = model.edit(picture, prompts[0], strength=strength, **options)
        else:
            made = model.inpaint(picture, images.load(mask), prompts[0], **options)
    for i, prompt in enumerate(prompts):
        for j, pixels in enumerate(made.pixels[i]):
            name = folder / f"{i:03d}_{_slug(prompt)}_seed{seed}_{j:02d}"
            images.save(f"{name}.png", Image.fromarray(pixels))
            if animate:
                images.save_animation(f"{name}.gif", _frames(model, made, i, j))
    path = folder / f"grid_seed{seed}.png"
    images.save(path, images.grid(made.pixels, prompts))
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
    """Writes pictures of all prompts of a file, on all devices; see ``sample_many``.

    Args:
      model_dir: a model folder, or the workdir of a training run.
      prompts_file: a text or a class label a line.
      config: its ``mesh`` says how this process's devices share the work; None spreads the images.
      output: folder; None is ``model_dir/samples_<name of the file>``.
      num_images: of all prompts together; None is one each.
      format: "png" or "array_record".
      **options: of ``VQDiffusion.generate``.
    """
    prompts = read_prompts(prompts_file)
    model = VQDiffusion.from_pretrained(model_dir)
    mesh = sharding.make_mesh(config or model.config, jax.local_devices())
    sample_many(
        model,
        prompts,
        output or str(Path(model_dir) / f"samples_{Path(prompts_file).stem}"),
        num_images=len(prompts) if num_images is None else num_images,
        mesh=mesh,
        format=format,
        **options,
    )


def read_prompts(path: str) -> list[str]:
    """The lines of a UTF-8 file; white space around them is dropped, and so are empty ones.

    Raises:
      UserError: it cannot be read, or has no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a file of prompts: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} has no prompt: give one a line")
    return prompts


def sample_many(
    model: VQDiffusion,
    prompts: Sequence[str],
    output: str,
    *,
    num_images: int,
    seed: int,
    mesh: Mesh,
    format: str = "png",
    batch_size: int = 64,
    **options,
) -> None:
    """Writes ``num_images`` pictures, or those that are still missing.

    Args:
      model: to sample from.
      prompts: P texts or class labels.
      output: folder: ``00000042.png``, or ``images-00000.array_record`` of ``BLOCK`` PNGs each; and
        ``prompts.txt``, line k of which is the prompt of picture k.
      num_images: of all prompts together.
      seed: decides the pictures.
      mesh: of this process's devices.
      format: a name in ``FORMATS``.
      batch_size: pictures in one call of the network.
      **options: of ``VQDiffusion.generate``.

    Raises:
      UserError: ``output`` holds pictures of other prompts.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        _claim(folder / "prompts.txt", [prompts[k % len(prompts)] for k in range(num_images)])
    model = model.on_mesh(mesh)
    blocks = range(0, num_images, BLOCK)[jax.process_index() :: jax.process_count()]
    with tqdm(total=num_images, desc="sampling", unit="image", mininterval=1) as bar:
        for start in blocks:
            numbers = np.arange(start, min(start + BLOCK, num_images))
            missing = [k for k in numbers if not _path(folder, k, format).exists()]
            if missing:
                made = _make(model, prompts, missing, seed, batch_size, options)
                _write(folder, missing, made, format)
            bar.update(len(numbers))
    logging.info("%d pictures of %d prompts are in %s", num_images, len(prompts), folder)


def _claim(path: Path, lines: list[str]) -> None:
    text = "\n".join(lines) + "\n"
    if path.exists():
        found = path.read_text(encoding="utf-8")
        if not (text.startswith(found) or found.startswith(text)):
            raise UserError(f"{path.parent} holds pictures of other prompts; use another --output")
        if found.startswith(text):
            return
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def _make(model, prompts, numbers, seed, batch_size, options) -> np.ndarray:
    pairs = [(k % len(prompts), k // len(prompts)) for k in numbers]
    codes = model.sample_codes(
        [prompts[i] for i, _ in pairs], pairs, seed=seed, batch_size=batch_size, **options
    )
    return model.decode_codes(codes, batch_size)


def _path(folder: Path, number: int, format: str) -> Path:
    if format == "png":
        return folder / f"{number:08d}.png"
    return folder / f"images-{number // BLOCK:05d}.array_record"


def _write(folder: Path, numbers: Sequence[int], pixels: np.ndarray, format: str) -> None:
    made = [Image.fromarray(p) for p in pixels]
    if format == "png":
        for number, image in zip(numbers, made, strict=True):
            images.save(_path(folder, number, format), image)
        return
    path = _path(folder, numbers[0], format)
    scratch = path.with_suffix(".tmp")
    writer = array_record_module.ArrayRecordWriter(str(scratch), "group_size:1")
    for image in made:
        encoded = io.BytesIO()
        image.save(encoded, format="PNG")
        writer.write(encoded.getvalue())
    writer.close()
    os.replace(scratch, path)


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
    task = stage_two.DenoiserTask(config)
    state = task_lib.abstract_state(task, mesh)
    lowered = task_lib.jit_step(task, mesh).lower(state, stage_two.abstract_batch(config, mesh))
    made = program.plan(state, lowered, mesh)
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
        images.masked(frame, mask.reshape(side, side))
        for frame, mask in zip(frames, hidden, strict=True)
    ]
    return [Image.fromarray(images.enlarge(f)) for f in [*start, *shown]]
