"""What each mode of the command line does, one function for each."""

import dataclasses
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from array_record.python import array_record_module
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from vqd_jax import config as config_lib
from vqd_jax import files
from vqd_jax.data import batches, codes, images, masks, report
from vqd_jax.data import encode as encode_lib
from vqd_jax.errors import UserError
from vqd_jax.interop import pretrained
from vqd_jax.parallel import processes, program, sharding
from vqd_jax.pipeline import Generation, VQDiffusion
from vqd_jax.training import stage_one, stage_two
from vqd_jax.training import task as task_lib
from vqd_jax.training.loop import Terminated
from vqd_jax.training.workdir import claim

# 128 + SIGTERM: what a shell reports when that signal ended a process.
TERMINATED_STATUS = 143
# Pictures that ``sample_many`` draws before it writes them; those in one file of records.
BLOCK = 256
FORMATS = ("png", "array_record")


def train(config: ConfigDict, workdir: str) -> None:
    """Trains both stages; ends with likelihoods and a grid of pictures."""
    _exit_if_terminated(stage_two.train, config, workdir)


def train_autoencoder(config: ConfigDict, workdir: str) -> None:
    """Trains stage one alone; its result is ``workdir/autoencoder/model``."""
    _exit_if_terminated(stage_two.train_autoencoder, config, workdir)
    logging.info("the autoencoder of this run is %s", pretrained.model_folder(workdir))


def _exit_if_terminated(run, config, workdir) -> None:
    try:
        run(config, workdir)
    except Terminated as stopped:
        logging.warning("%s", stopped)
        sys.exit(TERMINATED_STATUS)


def prepare(config: ConfigDict) -> None:
    """Makes the prepared data set of the config, unless it is there."""
    builder = encode_lib.data_set(config)
    sizes = ", ".join(f"{name} {s.num_examples:,}" for name, s in builder.info.splits.items())
    logging.info("%s in %s: %s", builder.info.full_name, builder.data_path, sizes)


def encode(config: ConfigDict, workdir: str) -> None:
    """Caches the codes of every split, in ``config.data.codes`` or ``workdir/codes``.

    The autoencoder is the workdir's or that of ``config.autoencoder.path``; without either it is
    trained. Processes share the shards. An interrupted encoding goes on where it stopped.
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

    The sheet shows the first records of the training stream. Beside each crop stands its
    reconstruction, if there is an autoencoder. Cached codes are used, if there are any.

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
    files.write_text(page, text)
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
    predictions: bool,
    image: str | None,
    mask: str | None,
    num_images: int | None,
    seed: int,
    **options: Any,
) -> None:
    """Writes ``grid_seed<seed>.png``, single pictures and, if asked for, animations.

    Args:
      model_dir: a model folder, or the workdir of a training run.
      prompts: texts or class labels; an empty one is unconditional.
      config: its ``sampling`` part replaces that of the run; None keeps the run's.
      output: folder; None is ``model_dir/samples``.
      animate: also write an animation of the denoising of every picture.
      predictions: also write an animation of the likeliest codes at every step.
      image: file of a picture to begin from; None begins from nothing.
      mask: file of a mask of the same size, white where to paint; None edits the whole picture.
      num_images: of every prompt; None is 4.
      seed: decides the pictures.
      **options: of ``VQDiffusion.generate``, ``edit`` or ``inpaint``; what is None is left out.
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
    folder = Path(output or Path(model_dir) / "samples")
    folder.mkdir(parents=True, exist_ok=True)
    logging.info("sampling %d pictures of %d prompts", num_images, len(prompts))
    options |= {"num_images": num_images, "seed": seed, "trajectory": animate or predictions}
    made = _drawn(model, prompts, image, mask, options)
    for i, prompt in enumerate(prompts):
        for j, pixels in enumerate(made.pixels[i]):
            name = f"{folder}/{i:03d}_{_slug(prompt)}_seed{seed}_{j:02d}"
            images.save(f"{name}.png", Image.fromarray(pixels))
            if animate:
                images.save_animation(f"{name}.gif", _frames(model, made.trajectory[:, i, j]))
            if predictions:
                frames = _frames(model, made.predictions[:, i, j])
                images.save_animation(f"{name}_predictions.gif", frames)
    path = folder / f"grid_seed{seed}.png"
    images.save(path, images.grid(made.pixels, prompts))
    logging.info("wrote %s and %d single pictures beside it", path, len(made.images))


def _drawn(model, prompts, image, mask, options) -> Generation:
    """New pictures, or those that begin from the picture in a file."""
    options = {name: value for name, value in options.items() if value is not None}
    if image is None:
        for name, value in (("mask", mask), ("strength", options.get("strength"))):
            if value is not None:
                raise UserError(f"--{name} needs the picture that it belongs to: --image=FILE")
        return model.generate(prompts, **options)
    if len(prompts) > 1:
        raise UserError("--image takes one --prompt")
    picture = images.load(image)
    if mask is None:
        return model.edit(picture, prompts[0], **options)
    return model.inpaint(picture, masks.load(mask), prompts[0], **options)


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
      prompts_file: has a text or a class label on each line.
      config: its ``mesh`` says how the devices of this process share the work; None takes that of
        the model's config.
      output: folder; None is ``model_dir/samples_<name of the file>``.
      num_images: of all prompts together; None is one for each.
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
    """The lines of a UTF-8 file without the white space around them; empty lines are left out.

    Raises:
      UserError: the file cannot be read, or has no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a file of prompts: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} has no prompt: write one on each line")
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
    negative_prompt: str | None = None,
    **options: Any,
) -> None:
    """Writes ``num_images`` pictures, or those that are still missing.

    Picture k is of prompt k mod P. Pictures come in blocks of ``BLOCK``, which several processes
    share. A block is written when it is complete, and one that is there is not made again.

    Args:
      model: to sample from.
      prompts: P texts or class labels.
      output: folder: ``00000042.png``, or ``images-00000.array_record`` of ``BLOCK`` PNGs each;
        ``prompts.txt``, line k of which is the prompt of picture k; and ``manifest.json``, which
        says what made the pictures.
      num_images: of all prompts together.
      seed: decides the pictures.
      mesh: of this process's devices.
      format: a name in ``FORMATS``.
      batch_size: pictures in one call of the network.
      negative_prompt: of ``VQDiffusion.generate``.
      **options: of ``VQDiffusion.settings``.

    Raises:
      UserError: ``output`` holds pictures of another model or request.
    """
    request = {"seed": seed, "negative_prompt": negative_prompt}
    _claim(Path(output), model, prompts, num_images, format, request, options)
    model = model.on_mesh(mesh)
    blocks = [range(k, min(k + BLOCK, num_images)) for k in range(0, num_images, BLOCK)]
    waiting = [block for block in blocks if _missing(output, block, format)]
    # Every process must have seen the same ones before any is written.
    processes.wait_for_all(f"{output}: blocks listed")
    mine = waiting[jax.process_index() :: jax.process_count()]
    with tqdm(total=sum(map(len, mine)), desc="sampling", unit="image", mininterval=1) as bar:
        for block in mine:
            missing = _missing(output, block, format)
            pairs = [(k % len(prompts), k // len(prompts)) for k in missing]
            texts = [prompts[i] for i, _ in pairs]
            made = model.sample_codes(texts, pairs, batch_size=batch_size, **request, **options)
            _write(output, missing, model.decode_codes(made, batch_size), format)
            bar.update(len(block))
    processes.wait_for_all(f"{output}: pictures written")
    logging.info("%d pictures of %d prompts are in %s", num_images, len(prompts), output)


def _claim(folder: Path, model, prompts, num_images, format, request, options) -> None:
    """Makes the folder and its manifest, or finds that they belong to the same request."""
    settings = model.settings(**options)
    wanted = {
        "model": model.fingerprint()[:16],
        "prompts": files.fingerprint({"prompts": list(prompts)})[:16],
        "format": format,
        **request,
    }
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        value = repr(value) if field.name == "rule" else value
        wanted[field.name] = np.asarray(value).tolist() if np.ndim(value) else value
    wanted = json.loads(json.dumps(wanted, default=float))
    path, remedy = folder / "manifest.json", "use another --output"

    def changes(stored):
        return files.differences({**stored, "num_images": 0}, {**wanted, "num_images": 0})

    folder.mkdir(parents=True, exist_ok=True)
    if processes.is_writer():
        if not path.exists() and (folder / "prompts.txt").exists():
            raise UserError(f"{folder} holds pictures but no {path.name}; {remedy}")
        stored = files.read_json(path, remedy) if path.exists() else wanted
        if not changes(stored):
            count = max(num_images, stored.get("num_images", 0))
            files.write_json(path, {**wanted, "num_images": count})
            lines = [f"{prompts[k % len(prompts)]}\n" for k in range(count)]
            files.write_text(folder / "prompts.txt", "".join(lines))
    processes.wait_for_all(f"{folder}: manifest written")
    changed = "; ".join(changes(files.read_json(path, remedy)))
    if changed:
        raise UserError(f"{folder} holds pictures of another request ({changed}); {remedy}")


def _path(folder: str, number: int, format: str) -> Path:
    if format == "png":
        return Path(folder) / f"{number:08d}.png"
    return Path(folder) / f"images-{number // BLOCK:05d}.array_record"


def _missing(folder: str, block: range, format: str) -> list[int]:
    """The pictures of a block that are not there; all of them, if its file has too few."""
    if format == "png":
        return [k for k in block if not _path(folder, k, format).exists()]
    path, found = _path(folder, block[0], format), 0
    if path.exists():
        reader = array_record_module.ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()
    return [] if found >= len(block) else list(block)


def _write(folder: str, numbers: Sequence[int], pixels: np.ndarray, format: str) -> None:
    path = _path(folder, numbers[0], format)
    if format == "png":
        for number, image in zip(numbers, pixels, strict=True):
            images.save(_path(folder, number, format), Image.fromarray(image))
        return
    with files.appearing(path) as scratch:
        writer = array_record_module.ArrayRecordWriter(str(scratch), "group_size:1")
        for image in pixels:
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, format="PNG")
            writer.write(encoded.getvalue())
        writer.close()


def evaluate(model_dir: str | None, **request: Any) -> None:
    """Measures a model, or pictures; see ``evaluation.evaluate.run``."""
    # Its networks are not for everybody who samples.
    from vqd_jax.evaluation import evaluate as evaluate_lib

    evaluate_lib.run(model_dir, draw=sample_many, **request)


def plan(
    config: ConfigDict,
    topology: str | None = None,
    hbm_gib: float | None = None,
    stage: str = "two",
) -> None:
    """Prints what every device needs for the training of ``config``; allocates nothing.

    Args:
      config: the resolved config.
      topology: devices that need not be here, see ``program.topology``; None is all devices here.
      hbm_gib: memory of one device in GiB; None is what its kind has.
      stage: "one" is the training of the autoencoder, "two" that of the denoiser.

    Raises:
      UserError: the mesh, the batch or the step does not fit the devices, or the compiler for them
        is missing.
    """
    devices = jax.devices() if topology is None else program.topology(topology)
    mesh = sharding.make_mesh(config, devices)
    sections = ("autoencoder", "autoencoder") if stage == "one" else ("training", "denoiser")
    c = config[sections[0]]
    sharding.require_divisible(
        f"{sections[0]}.batch_size", c.batch_size, mesh, c.gradient_accumulation
    )
    logging.info("compiling the train step for %d x %s", len(devices), devices[0].device_kind)
    if stage == "one":
        task, batch = (
            stage_one.AutoencoderTask(config, mesh),
            stage_one.abstract_batch(config, mesh),
        )
    else:
        task, batch = stage_two.DenoiserTask(config), stage_two.abstract_batch(config, mesh)
    state = task_lib.abstract_state(task, mesh)
    made = program.plan(state, task_lib.jit_step(task, mesh).lower(state, batch), mesh)
    hbm_gib = program.hbm_of(devices[0]) if hbm_gib is None else hbm_gib
    print(program.describe(made, mesh, hbm_gib, *sections))


def export(model_dir: str, target: str, format: str) -> None:
    """Writes a model in the layout of another program; see ``VQDiffusion.save_pretrained``."""
    VQDiffusion.from_pretrained(model_dir).save_pretrained(target, format=format)
    logging.info("wrote %s", target)


def _slug(prompt: str) -> str:
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:40] or "no-prompt"


def _frames(model: VQDiffusion, tokens: np.ndarray) -> list[Image.Image]:
    """The picture after every step, of tokens [F, N]; what is still masked is grey."""
    hidden = tokens == model.config.autoencoder.num_codes
    grid = (config_lib.autoencoder_config(model.config).grid_size,) * 2
    # A masked place is decoded as the code that it gets in the end, so that its neighbours look
    # as they will; then it is covered.
    frames = model.decode_codes(np.where(hidden, tokens[-1], tokens))
    shown = [images.masked(f, h.reshape(grid)) for f, h in zip(frames, hidden, strict=True)]
    start = np.full_like(shown[0], 160)
    return [Image.fromarray(images.enlarge(frame)) for frame in [start, *shown]]
