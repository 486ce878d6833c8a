"""What each mode of the command line does, one function for each."""

import functools
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from vqd_jax import bulk, files, request
from vqd_jax import config as config_lib
from vqd_jax.data import batches, codes, images, masks, report
from vqd_jax.data import encode as encode_lib
from vqd_jax.errors import UserError
from vqd_jax.generation import Generation, Preview
from vqd_jax.interop import pretrained
from vqd_jax.parallel import processes, program, sharding
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.training import distil as distil_lib
from vqd_jax.training import stage_one, stage_two
from vqd_jax.training import task as task_lib
from vqd_jax.training.loop import Terminated
from vqd_jax.training.workdir import claim

# 128 + SIGTERM: what a shell reports when that signal ended a process.
TERMINATED_STATUS = 143


def train(config: ConfigDict, workdir: str) -> None:
    """Trains both stages; ends with likelihoods and a grid of pictures."""
    _exit_if_terminated(stage_two.train, config, workdir)


def train_autoencoder(config: ConfigDict, workdir: str) -> None:
    """Trains stage one alone; its result is ``workdir/autoencoder/model``."""
    _exit_if_terminated(stage_two.train_autoencoder, config, workdir)
    logging.info("the autoencoder of this run is %s", pretrained.model_folder(workdir))


def distil(config: ConfigDict, model_dir: str, workdir: str, **options: Any) -> None:
    """Trains a student of few steps on pictures that a model draws.

    Args:
      config: how it is trained, and for how many steps; see ``training.distil.student_config``.
      model_dir: the teacher, a model folder or a workdir.
      workdir: of the student.
      **options: of ``VQDiffusion.generate``: how the teacher draws.
    """
    path = config.distil.prompts_path
    prompts = read_prompts(path) if path else None
    _exit_if_terminated(distil_lib.distil, config, model_dir, workdir, prompts, **options)


def _exit_if_terminated(run, *args, **options) -> None:
    try:
        run(*args, **options)
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
        "record_weights": encode_lib.record_weights(config, builder),
    }
    directory = encode_lib.directory(config, workdir)
    if codec is not None and (Path(directory) / encode_lib.TRAIN / codes.MANIFEST).exists():
        stored = encode_lib.open_split(config, directory, encode_lib.TRAIN, params, content)
        return report.cached_samples(stored, source, codec, crop, content, **stream)
    return report.source_samples(source, codec, crop, num_crops, content, **stream)


def _loaded(model_dir, dtype, autoencoder_dtype, mesh) -> VQDiffusion:
    """The model; on several devices if the sizes of a mesh are given."""
    made = None if mesh is None else _mesh(mesh, None)
    return VQDiffusion.from_pretrained(
        model_dir, dtype=dtype, autoencoder_dtype=autoencoder_dtype, mesh=made
    )


def _mesh(sizes: tuple[int, ...], devices: list | None) -> Mesh:
    if len(sizes) != len(sharding.AXES):
        given = ",".join(map(str, sizes))
        raise UserError(f"--mesh={given}: must be three sizes, of {', '.join(sharding.AXES)}")
    config = config_lib.default_config()
    config.mesh.update(dict(zip(sharding.AXES, sizes, strict=True)))
    return sharding.make_mesh(config, devices)


def sample(
    prompts: Sequence[str] | None,
    *,
    model_dir: str,
    dtype: str | None,
    autoencoder_dtype: str,
    mesh: tuple[int, int, int] | None,
    config: ConfigDict | None,
    output: str | None,
    animate: bool,
    predictions: bool,
    preview_steps: int | None,
    image: Sequence[str] | None,
    mask: Sequence[str] | None,
    paste: bool,
    num_images: int | None,
    seed: int,
    **options: Any,
) -> None:
    """Writes ``grid_seed<seed>.png``, single pictures and, if asked for, animations.

    Args:
      prompts: texts or class labels; an empty one is unconditional.
      model_dir: a model folder, or the workdir of a training run.
      dtype, autoencoder_dtype: of ``VQDiffusion.from_pretrained``.
      mesh: devices along data, fsdp and tensor; None is one device.
      config: its ``sampling`` part replaces that of the run; None keeps the run's.
      output: folder; None is ``model_dir/samples``, or ``samples`` of a packaged model.
      animate: also write an animation of the denoising of every picture.
      predictions: also write an animation of the likeliest codes at every step.
      preview_steps: also write ``preview_seed<seed>.png`` after every so many network calls.
      image: files of pictures to begin from, one or one for each prompt; None begins from nothing.
      mask: files of masks of the same sizes, white where to paint; None edits the whole pictures.
      paste: single pictures are the given ones, at their own size, with the masked part made anew.
      num_images: of every prompt; None is 4.
      seed: decides the pictures.
      **options: of ``VQDiffusion.generate``, ``edit`` or ``inpaint``; what is None is left out.
    """
    num_images = 4 if num_images is None else num_images
    model = _loaded(model_dir, dtype, autoencoder_dtype, mesh)
    prompts = _asked(model, prompts, config, model_dir)
    folder = Path(output or pretrained.beside(model_dir) / "samples")
    folder.mkdir(parents=True, exist_ok=True)
    logging.info("sampling %d pictures of %d prompts", num_images, len(prompts))
    options |= {"num_images": num_images, "seed": seed, "trajectory": animate or predictions}
    preview = None if preview_steps is None else folder / f"preview_seed{seed}.png"
    if preview:
        options["callback_steps"] = preview_steps
    with tqdm(total=100, desc="sampling", unit="%", bar_format=_BAR) as bar:
        options["callback"] = functools.partial(_show, bar, preview)
        made = _drawn(model, prompts, image, mask, paste, options)
    prompts = request.spread("prompt", prompts, len(made.images) // num_images)
    for k, picture in enumerate(made.images):
        i, j = divmod(k, num_images)
        name = f"{folder}/{i:03d}_{_slug(prompts[i])}_seed{seed}_{j:02d}"
        _save(name, picture, model, made, (i, j), animate, predictions)
    path = folder / f"grid_seed{seed}.png"
    images.save(path, images.grid(made.pixels, prompts))
    logging.info("wrote %s and %d single pictures beside it", path, len(made.images))


def _asked(model, prompts, config, model_dir) -> Sequence[str]:
    """The prompts; what a config says of sampling replaces what the model's says."""
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
    return prompts


def _save(name, picture, model, made, which, animate, predictions) -> None:
    """Writes a picture and its animations; ``which`` are its prompt and its image."""
    images.save(f"{name}.png", picture)
    for wanted, tokens, ending in (
        (animate, made.trajectory, ".gif"),
        (predictions, made.predictions, "_predictions.gif"),
    ):
        if wanted:
            images.save_animation(f"{name}{ending}", _frames(model, tokens[:, *which]))


# A percentage, the time that it took, and the time that is left.
_BAR = "{l_bar}{bar}| {elapsed}<{remaining}"


def _show(bar: tqdm, path: Path | None, preview: Preview) -> None:
    """Moves a bar on and, if there is a path, shows how far the pictures are."""
    bar.update(100 * preview.progress - bar.n)
    if path is not None:
        shown = [Image.fromarray(images.enlarge(pixels)) for pixels in preview.pixels]
        images.save(path, images.tiled([shown[k : k + 4] for k in range(0, len(shown), 4)]))


def _drawn(model, prompts, image, mask, paste, options) -> Generation:
    """New pictures, or those that begin from pictures in files."""
    options = {name: value for name, value in options.items() if value is not None}
    if image is None:
        given = (("mask", mask), ("strength", options.get("strength")), ("paste", paste or None))
        for name, value in given:
            if value is not None:
                raise UserError(f"--{name} needs the picture that it belongs to: --image=FILE")
        return model.generate(prompts, **options)
    pictures = [images.load(path) for path in image]
    if mask is None:
        if paste:
            raise UserError("--paste needs --mask=FILE: what it leaves is put back")
        return model.edit(pictures, list(prompts), **options)
    painted = [masks.load(path) for path in mask]
    return model.inpaint(pictures, painted, list(prompts), paste=paste, **options)


def likelihood(
    image: Sequence[str],
    prompts: Sequence[str] | None,
    seed: int,
    num_draws: int | None,
    *,
    model_dir: str,
    dtype: str | None,
    autoencoder_dtype: str,
    mesh: tuple[int, int, int] | None,
) -> None:
    """Prints the bits of every picture; see ``VQDiffusion.likelihood``.

    Args:
      image: files of pictures.
      prompts: texts or labels, one or one for each picture.
      seed: decides the noise.
      num_draws: of ``VQDiffusion.likelihood``.
      model_dir, dtype, autoencoder_dtype, mesh: of ``sample``.
    """
    model = _loaded(model_dir, dtype, autoencoder_dtype, mesh)
    pictures = [images.load(path) for path in image]
    found = model.likelihood(pictures, prompts, seed=seed, num_draws=num_draws)
    count = len(found.bits_per_token)
    paths, texts = (request.spread("image", x, count) for x in (image, prompts or [""]))
    for path, text, token, whole in zip(paths, texts, *found, strict=True):
        print(f"{path} {text!r}: {token:.4f} bits a token, {whole:.1f} bits a picture")


def sample_file(
    prompts_file: str,
    *,
    model_dir: str,
    dtype: str | None,
    autoencoder_dtype: str,
    mesh: tuple[int, int, int] | None,
    config: ConfigDict | None,
    output: str | None,
    num_images: int | None,
    format: str,
    **options,
) -> None:
    """Writes pictures of all prompts of a file, on all devices; see ``bulk.sample_many``.

    Args:
      prompts_file: has a text or a class label on each line.
      model_dir: a model folder, or the workdir of a training run.
      dtype, autoencoder_dtype: of ``VQDiffusion.from_pretrained``.
      mesh: how the devices of this process share the work, along data, fsdp and tensor; None takes
        that of ``config``.
      config: its ``mesh`` counts where ``mesh`` is None; None takes that of the model's config.
      output: folder; None is ``model_dir/samples_<name of the file>``.
      num_images: of all prompts together; None is one for each.
      format: "png" or "array_record".
      **options: of ``VQDiffusion.generate``.
    """
    prompts = read_prompts(prompts_file)
    model = _loaded(model_dir, dtype, autoencoder_dtype, None)
    devices = jax.local_devices()
    on = (
        sharding.make_mesh(config or model.config, devices)
        if mesh is None
        else _mesh(mesh, devices)
    )
    bulk.sample_many(
        model,
        prompts,
        output or str(pretrained.beside(model_dir) / f"samples_{Path(prompts_file).stem}"),
        num_images=len(prompts) if num_images is None else num_images,
        mesh=on,
        format=format,
        **options,
    )


def read_prompts(path: str) -> list[str]:
    """The lines of a text file without the white space around them; empty lines are left out.

    The encoding is found as ``files.decode_text`` says.

    Raises:
      UserError: the file cannot be read, or has no prompt.
    """
    try:
        text = files.decode_text(Path(path).read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path} cannot be read as a file of prompts: {error}") from error
    if "\0" in text:
        raise UserError(f"{path} is no text: it holds bytes of zero")
    # `splitlines` would also cut at separators inside of texts.
    lines = files.whole_characters(text).replace("\r", "\n").split("\n")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} has no prompt: write one on each line")
    return prompts


def evaluate(model_dir: str | None, **request: Any) -> None:
    """Measures a model, or pictures; see ``evaluation.evaluate.run``."""
    # Its networks are not for everybody who samples.
    from vqd_jax.evaluation import evaluate as evaluate_lib

    evaluate_lib.run(model_dir, draw=bulk.sample_many, **request)


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
    devices = processes.devices() if topology is None else program.topology(topology)
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


def export(
    model_dir: str, target: str, format: str, dtype: str | None, autoencoder: str | None
) -> None:
    """Writes a model folder, or a model in the layout of another program.

    Args:
      model_dir: a model folder, or the workdir of a training run.
      target, format: of ``VQDiffusion.save_pretrained``; or "adapters" for what a run with
        ``config.training.adapter_rank`` has learnt, a small folder that names its base.
      dtype: how a vqd_jax folder stores floats; None is "float32".
      autoencoder: where a better decoder of the same codes is; None keeps the model's.
    """
    if format == "adapters":
        pretrained.save_adapters(model_dir, target)
        logging.info("wrote %s", target)
        return
    if dtype and format != "vqd_jax":
        raise UserError(f"--dtype={dtype} belongs to --format=vqd_jax; others have float32")
    model = VQDiffusion.from_pretrained(model_dir)
    if autoencoder:
        model = model.with_decoder(autoencoder)
    model.save_pretrained(target, format=format, dtype=dtype or "float32")
    logging.info("wrote %s", target)


def serve(host: str, port: int, **loading: Any) -> None:
    """Serves the page of a model; see ``web.server.serve``, and ``sample`` for how it is loaded."""
    try:
        # An extra; nothing else needs it.
        from vqd_jax.web import server
    except ModuleNotFoundError as error:
        raise UserError(f"the page needs {error.name}: pip install 'vqd_jax[web]'") from error
    server.serve(_loaded(**loading), host, port)


def _slug(prompt: str) -> str:
    # Signs alone, such as emoji, are spelled out.
    signs = (unicodedata.name(x, "") for x in prompt if unicodedata.category(x)[0] == "S")
    found = (re.sub(r"[\W_]+", "-", x.lower()).strip("-") for x in (prompt, " ".join(signs)))
    return next(filter(None, found), "no-prompt")[:40]


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
