"""Few steps: a student learns from first tokens and the pictures that a teacher made of them.

Drawn in one step, tokens do not see each other, and what they have to agree on goes wrong. In a
chain of ``rules.Flow`` the picture depends on the tokens that the chain began with. A student that
is trained on such pairs reads in them what the teacher decided later, so that less is left to agree
on: rectified discrete flow, ReDi (arXiv:2507.15897). The teacher's guidance is in its pictures, so
the student needs none. A teacher whose chains all begin with masks has nothing to tell apart;
docs/distillation.md says how to give it other noise.

Letters: R pairs, P prompts, B batch, N image tokens, L text positions, S steps of the student.
"""

import dataclasses
import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vqd_jax import checkpoint, files, request
from vqd_jax import config as config_lib
from vqd_jax.data import batches, encode, order
from vqd_jax.diffusion import objective, sampler
from vqd_jax.errors import UserError
from vqd_jax.generation import image_keys
from vqd_jax.interop import folder, pretrained
from vqd_jax.parallel import sharding
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.training import loop, moments
from vqd_jax.training.metrics import progress_bar
from vqd_jax.training.stage_two import CONDITION_KEYS, DenoiserTask, Evaluation, train_step
from vqd_jax.training.workdir import claim

# Pairs in one file.
CHUNK = 256
# The stream of random numbers that chooses the prompts of pairs.
_PROMPT_STREAM = 3
# What a student has from the config that is given; all else is the teacher's.
_GIVEN = ("training", "mesh", "sampling", "distil")


def student_config(teacher: ConfigDict, given: ConfigDict, model_dir: str) -> ConfigDict:
    """The config of a student: its teacher's model, and how the given config trains and samples.

    Args:
      teacher: config of the teacher.
      given: its sections ``training``, ``mesh``, ``sampling`` and ``distil`` count, and its seed.
        The student begins as ``training.init_from``, or as its teacher where that is ''.
        ``text_encoder.path`` names a text encoder that stays as it is; '' keeps the teacher's.
      model_dir: the teacher's model folder or workdir.

    Raises:
      UserError: the values do not fit together.
    """
    config = teacher.copy_and_resolve_references()
    with config.unlocked():
        for section in _GIVEN:
            config[section] = given[section].copy_and_resolve_references()
    config.seed = given.seed
    config.autoencoder.path = model_dir
    config.training.init_from = given.training.init_from or model_dir
    config.text_encoder.path = given.text_encoder.path or config.text_encoder.path
    config.data.cache_text_features = False
    config.sampling.num_steps = config.distil.num_steps
    config.sampling.rule, config.sampling.guidance_scale = "flow", 1.0
    if config.distil.num_steps > config.diffusion.num_steps:
        raise UserError(
            f"config.distil.num_steps={config.distil.num_steps}: must not exceed the "
            f"{config.diffusion.num_steps} times of {model_dir}"
        )
    if config.distil.moment_weight and config.training.adapter_rank:
        raise UserError(
            "config.distil.moment_weight: a student that is judged trains all of its parameters; "
            "leave config.training.adapter_rank at 0"
        )
    config_lib.validate(config)
    return config


def prompts_of(config: ConfigDict) -> list[str] | list[int]:
    """What a teacher is asked to draw where no file of prompts is given.

    They are all labels, or the captions of its training pictures but those that are held out.

    Raises:
      UserError: the data set is not there.
    """
    if config.denoiser.condition == "none":
        return [""]
    if config.denoiser.condition == "class":
        return list(range(config.denoiser.num_classes))
    config_lib.require_data(config)
    records = batches.records(encode.data_set(config), encode.TRAIN, decode=False)
    found = {caption for i in range(len(records)) for caption in records[i]["captions"]}
    return sorted(found - {"", *config.data.hold_out})


def draw_pairs(
    teacher: VQDiffusion,
    prompts: Sequence[str] | Sequence[int],
    config: ConfigDict,
    directory: str,
    fingerprint: str,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Pairs of a teacher, drawn and kept in files; those that are there are not drawn again.

    Pair k depends on the teacher, (seed, k) and the prompts alone.

    Args:
      teacher: the model that draws.
      prompts: P texts or labels; every pair has one of them, chosen at random.
      config: of the student; its ``seed``, ``distil.num_pairs`` R, and ``training.null_text_rate``,
        the share of pairs without a prompt.
      directory: of the files.
      fingerprint: of the teacher's parameters.
      **options: of ``VQDiffusion.generate``: how the teacher draws, unless its config says it.

    Returns:
      ``first`` int32 [R, N], the tokens at time T, where K is the mask; ``codes`` int32 [R, N],
      what became of them; and the condition, ``text_ids`` int32 [R, L] or ``label`` int32 [R].

    Raises:
      UserError: the files are of another teacher, or of other settings.
    """
    options = {"rule": "flow"} | options
    where, count = Path(directory), config.distil.num_pairs
    _claim_pairs(where, fingerprint, teacher.config, prompts, config, options)
    starts = range(0, count, CHUNK)
    missing = [start for start in starts if not _path(where, start).exists()]
    if missing:
        logging.info("the teacher draws %d pairs of %d prompts", count, len(prompts))
    there = CHUNK * (len(starts) - len(missing))
    with progress_bar("pairs", CHUNK * len(starts), there, "pair") as bar:
        for start in missing:
            drawn = _draw(teacher, prompts, config, range(start, start + CHUNK), options)
            with files.appearing(_path(where, start)) as scratch, open(scratch, "wb") as file:
                np.savez(file, **drawn)
            bar.update(CHUNK)
    parts = [_read(_path(where, start)) for start in starts]
    return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}


def _path(where: Path, start: int) -> Path:
    return where / f"pairs_{start // CHUNK:05d}.npz"


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as stored:
            return {name: stored[name].astype(np.int32) for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and it is drawn again") from error


def _claim_pairs(where, fingerprint, teacher, prompts, config, options) -> None:
    """Writes what the pairs depend on; refuses a folder of others."""
    decided = ("num_steps", "guidance_scale", "truncation")
    wanted = {
        "teacher": fingerprint,
        "prompts": hashlib.sha256("\n".join(map(str, prompts)).encode()).hexdigest()[:16],
        "seed": config.seed,
        "null_text_rate": config.training.null_text_rate,
        **{name: teacher.sampling[name] for name in decided},
        **{name: list(x) if isinstance(x, tuple) else x for name, x in options.items()},
    }
    path = where / "pairs.json"
    if path.exists():
        differing = files.differences(files.read_json(path, "remove the folder"), wanted)
        if differing:
            raise UserError(
                f"the pairs in {where} are others ({'; '.join(differing)}); use another --workdir"
            )
    files.write_json(path, wanted)


def _draw(teacher, prompts, config, numbers, options) -> dict[str, np.ndarray]:
    chosen, null = order.uniforms((config.seed, _PROMPT_STREAM), np.array(numbers))
    texts = [prompts[int(x * len(prompts))] for x in chosen]
    texts = [
        "" if x < config.training.null_text_rate else t for x, t in zip(null, texts, strict=True)
    ]
    pairs = [(k, 0) for k in numbers]
    size = min(CHUNK, config.training.batch_size)
    made = teacher.sample_rows(texts, pairs, seed=config.seed, batch_size=size, **options)
    # A chain depends on its own key alone, so the tokens that it began with can be made again.
    keys = image_keys(np.full(len(pairs), config.seed, np.uint32), np.array(pairs, np.uint32))
    schedule = config_lib.noise_schedule(teacher.config)
    begin = jax.jit(sampler.begin, static_argnums=1)
    first = begin(keys, made.codes.shape, schedule, teacher.settings(**options))[0].tokens
    # Codes are below 65,536, but the mask may be that.
    drawn = {"codes": made.codes.astype(np.uint16), "first": np.asarray(first, np.int32)}
    key = CONDITION_KEYS[teacher.config.denoiser.condition]
    if key:
        drawn[key] = request.Conditions(teacher.config, teacher.tokenizer)(texts)
    return drawn


def pair_dataset(pairs: dict[str, np.ndarray], batch_size: int, seed: int) -> order.Batches:
    """Endless shuffled batches of pairs, ``{name: int32 [B, ...]}``; ``order`` has their state."""

    def make(local):
        taken = local.batch(batch_size, drop_remainder=True, batch_fn=np.array)
        rows = taken.map(lambda keys: {name: x[keys % len(x)] for name, x in pairs.items()})
        return rows.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))

    count = len(pairs["codes"])
    return order.Batches(order.shuffled([count], seed), make, count, batch_size)


def loss(key, predict, batch, statistics, config):
    """``objective.rectified`` as a ``stage_two.Loss``."""
    schedule = config_lib.noise_schedule(config)
    times = sampler.step_times(config.distil.num_steps, schedule)[:-1]
    ends = batch["codes"], batch["first"]
    value, accuracy = objective.rectified(key, predict, *ends, schedule, times)
    return value, (statistics, {"accuracy": accuracy})


class StudentTask(DenoiserTask):
    """A denoiser that learns from pairs; its batches have ``first`` beside ``codes``."""

    name, prefix = "distillation", "train"

    def train_step(self, state, batch, placement):
        return train_step(state, batch, config=self._config, placement=placement, loss=loss)


def distil(
    given: ConfigDict,
    model_dir: str,
    workdir: str,
    prompts: Sequence[str] | None = None,
    **options: Any,
) -> None:
    """Draws the pairs of a teacher and trains a student on them; ends with a grid of pictures.

    Args:
      given: see ``student_config``.
      model_dir: the teacher, a model folder or a workdir.
      workdir: of the student; what is there already is gone on with.
      prompts: what the teacher draws; None is ``prompts_of``.
      **options: of ``VQDiffusion.generate``, for the teacher.

    Raises:
      UserError: the teacher cannot be read, or something does not fit; the message names it.
    """
    if jax.process_count() > 1:
        raise UserError("--mode=distil works in one process, on all of its devices")
    # None is a flag that was not given.
    options = {name: x for name, x in options.items() if x is not None}
    found = pretrained.load_model(model_dir, place=np.asarray)
    config = student_config(found.config, given, model_dir)
    mesh, c = sharding.make_mesh(config), config.training
    sharding.require_divisible("training.batch_size", c.batch_size, mesh, c.gradient_accumulation)
    if float(config_lib.noise_schedule(config).mask[-1]) > 0.999:
        logging.warning(
            "all chains of this teacher begin with the same tokens, all masked, so that its pairs "
            "tell a student little; docs/distillation.md says how to give it other noise"
        )
    fingerprint = files.fingerprint(found.params)
    with claim(config, workdir):
        sizes = dataclasses.asdict(config_lib.autoencoder_config(config))
        if not Path(pretrained.model_folder(workdir)).exists():
            folder.save(pretrained.model_folder(workdir), sizes, found.autoencoder_params)
        teacher = VQDiffusion(*found).on_mesh(mesh)
        prompts = prompts_of(config) if prompts is None else prompts
        where = str(Path(workdir) / "pairs")
        pairs = draw_pairs(teacher, prompts, config, where, fingerprint, **options)
        evaluation = Evaluation(config, workdir, {}, found.autoencoder_params, mesh)
        pairs = pair_dataset(pairs, c.batch_size, config.seed)
        if config.distil.moment_weight:
            if teacher.settings(**options).guidance is not None:
                logging.warning(
                    "the pairs are drawn with guidance, and the judge of config.distil."
                    "moment_weight has none: they pull apart; --guidance_scale=1 ends that"
                )
            judge = jax.tree.map(np.asarray, found.params)
            task = moments.MatchedTask(config, pairs, evaluation, judge)
        else:
            task = StudentTask(config, pairs, evaluation)
        place = loop.Place(workdir, str(checkpoint.folder(config, workdir)), mesh, config)
        loop.fit(task, loop.Schedule.of(config), place)
