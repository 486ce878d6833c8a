"""One evaluation from the beginning to its report: draws, measures, writes.

Everything that takes long is kept in the output folder: pictures, and the features of every block
of pictures. An evaluation that was killed goes on from there, and its report is the same.
"""

import itertools
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax import files
from vqd_jax.data import batches, encode
from vqd_jax.errors import UserError
from vqd_jax.evaluation import account, distances, features, figures, protocols
from vqd_jax.evaluation.figures import Made, Request
from vqd_jax.evaluation.pictures import FolderPictures
from vqd_jax.interop import pretrained
from vqd_jax.parallel import processes, sharding
from vqd_jax.pipeline import VQDiffusion

# What a sweep may vary, and how its values are read.
AXES = {"num_steps": int, "rule": str, "guidance_scale": float, "truncation": float}


def run(
    model_dir: str | None,
    *,
    config: ConfigDict | None,
    output: str | None,
    pictures: str | None,
    sweep: Sequence[str],
    seed: int,
    draw: Callable[..., None],
    **options: Any,
) -> None:
    """Writes ``report.json``, ``report.html`` and ``protocol.txt`` into ``output``.

    Args:
      model_dir: a model folder, or the workdir of a training run; None with ``pictures``.
      config: its data, evaluation, sampling and mesh; None takes those of the model.
      output: folder; None is ``model_dir/evaluation``.
      pictures: a folder of pictures that something else made; None draws them.
      sweep: "axis=value,value" of every axis in ``AXES`` that varies.
      seed: decides the pictures.
      draw: ``bulk.sample_many``.
      **options: of ``VQDiffusion.generate``; None takes the config's.

    Raises:
      UserError: something is missing, or too few pictures are asked for.
    """
    started = time.time()
    if pictures and sweep:
        raise UserError("--sweep draws pictures, and --pictures has them already: leave one out")
    varied = read_sweep(sweep)
    request = _request(model_dir, config, output)
    nets = features.of_config(request.config)
    clip = features.Clip(request.config.evaluation.clip) if request.config.evaluation.clip else None
    everything = nets + ([clip.images] if clip else [])
    if pictures:
        made = [_given(request, pictures)]
    else:
        if request.model is None:
            raise UserError("--model=MODEL is missing, or --pictures=DIR")
        made = []
    count = len(made[0].pictures) if made else request.plan.num_generated
    _require_enough(request, everything, count)
    if not made:
        made = _drawn(request, varied, seed, draw, options)
    measured = [figures.measure(request, net, made, clip) for net in everything]
    if not processes.is_writer():
        return
    account.write(request, everything, made, measured, seed=seed, started=started)


def read_sweep(sweep: Sequence[str]) -> dict[str, list[Any]]:
    """{'num_steps': [10, 25], ...} of "num_steps=10,25" and so on.

    Raises:
      UserError: an axis is unknown or twice, or a value is none of its kind.
    """
    varied = {}
    for text in sweep:
        name, _, values = text.partition("=")
        name = name.strip()
        if name not in AXES or name in varied or not values:
            raise UserError(f"--sweep={text}: give each of {', '.join(AXES)} once, as name=1,2,3")
        try:
            varied[name] = list(dict.fromkeys(AXES[name](v.strip()) for v in values.split(",")))
        except ValueError as error:
            raise UserError(f"--sweep={text}: {error}") from error
    return varied


def _request(model_dir, config, output) -> Request:
    model = params = codec = None
    if model_dir:
        loaded = pretrained.load_model(model_dir)
        model, params, codec = VQDiffusion(*loaded), loaded.params, loaded.autoencoder_params
        config = _joined(model_dir, loaded.config, config)
        model.config.sampling = config.sampling
    if config is None:
        raise UserError("--config=FILE is missing: it says which data set the pictures are of")
    if not (output or model_dir):
        raise UserError("--output=DIR is missing")
    config_lib.require_data(config)
    builder = encode.data_set(config)
    protocol = protocols.find(config.evaluation.protocol, config.data.name)
    split = protocols.split_of(protocol.prompts, builder)
    records = batches.records(builder, split, decode=False)
    plan = protocols.plan(
        protocol,
        builder,
        records,
        condition=config.denoiser.condition,
        num_classes=config.denoiser.num_classes,
        num_generated=config.evaluation.num_generated,
    )
    folder = Path(output or pretrained.beside(model_dir) / "evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    return Request(config, model, params, codec, plan, builder, records, folder)


def _joined(model_dir, own: ConfigDict, given: ConfigDict | None) -> ConfigDict:
    """The sizes of the model, with the data, evaluation, sampling and mesh of ``given``."""
    if given is None:
        return own
    if given.data.image_size != own.data.image_size:
        raise UserError(
            f"{model_dir} makes pictures of {own.data.image_size} pixels, and "
            f"config.data.image_size={given.data.image_size}; give the config of the model"
        )
    joined = ConfigDict(own.to_dict())
    for section in ("data", "evaluation", "sampling", "mesh"):
        joined[section] = ConfigDict(given[section].to_dict())
    joined.lock()
    config_lib.validate(joined, own_tokenizer=True)
    return joined


def _require_enough(request, nets, count) -> None:
    c = request.config.evaluation
    if "frechet" not in c.metrics:
        return
    for net in nets:
        distances.require_covariance(count, net.width, "generated pictures")
        if not (c.inception_statistics and net.name.startswith("inception")):
            real = len(request.plan.reference)
            distances.require_covariance(real, net.width, "real pictures")


def _given(request, directory) -> Made:
    count = request.config.evaluation.num_generated or None
    found = FolderPictures(directory, request.config.data.image_size, count=count)
    place = dict(zip(request.plan.prompts, request.plan.records.tolist(), strict=True))
    prompts = found.prompts
    records = np.array([place.get(text, -1) for text in prompts or [""]])
    setting = {"pictures": "given", "content": found.identity["content"][:16]}
    return Made(setting, found, prompts, records)


def _drawn(request, varied, seed, draw, options) -> list[Made]:
    """Pictures of every setting, drawn where they are missing."""
    model, plan, made = request.model, request.plan, []
    mesh = sharding.make_mesh(request.config, jax.local_devices())
    options = {name: value for name, value in options.items() if value is not None}
    whole = model.fingerprint()
    combinations = [dict(zip(varied, v, strict=True)) for v in itertools.product(*varied.values())]
    chosen = [options | combination for combination in combinations]
    for some in chosen:
        # Before the first picture is drawn.
        model.settings(**{k: v for k, v in some.items() if k != "negative_prompt"})
    for number, some in enumerate(chosen, 1):
        shown = _shown(request.config, some)
        named = {"setting": shown, "seed": seed, "model": whole, "prompts": plan.prompts}
        mark = files.fingerprint({"": json.dumps(named, sort_keys=True, default=list)})[:8]
        name = "_".join(str(v) for v in list(shown.values())[:4]).replace(".0", "")
        folder = request.output / "pictures" / f"{re.sub(r'[^0-9A-Za-z.]+', '_', name)}_{mark}"
        logging.info("setting %d of %d: %s", number, len(chosen), shown)
        draw(
            model, plan.prompts, str(folder), num_images=plan.num_generated, seed=seed, mesh=mesh,
            **some,
        )  # fmt: skip
        pictures = FolderPictures(
            folder, request.config.data.image_size, {"mark": mark, **named}, plan.num_generated
        )
        made.append(Made(shown, pictures, plan.prompts, plan.records))
    return made


def _shown(config, options) -> dict[str, Any]:
    """What a report says of a setting: the four axes first, then what else was asked for."""
    steps = config.sampling.num_steps or config.diffusion.num_steps
    unguided = config.denoiser.condition == "none"
    usual = {
        "rule": config.sampling.rule,
        "num_steps": steps,
        "guidance_scale": 1.0 if unguided else config.sampling.guidance_scale,
        "truncation": config.sampling.truncation,
    }
    more = {name: value for name, value in options.items() if value not in (False, None)}
    if not options.keys().isdisjoint(("times", "published_fast")):
        del usual["num_steps"]
    # A flag of one number is a tuple of one.
    more = {n: v[0] if isinstance(v, tuple) and len(v) == 1 else v for n, v in more.items()}
    return json.loads(json.dumps(usual | more))
