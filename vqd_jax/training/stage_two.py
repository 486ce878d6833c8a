"""Stage two: trains text-to-image diffusion on the codes of stage one."""

import contextlib
import fcntl
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vqd_jax import checkpoint
from vqd_jax import config as config_lib
from vqd_jax.data import batches, codes, encode, images, sets
from vqd_jax.data.codes import CachedRecord
from vqd_jax.diffusion import objective
from vqd_jax.errors import UserError
from vqd_jax.evaluation.likelihood import caption_likelihood
from vqd_jax.interop import pretrained
from vqd_jax.models import conditioned
from vqd_jax.parallel import processes, sharding
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.training import loop, stage_one
from vqd_jax.training import state as state_lib

LIKELIHOOD_BATCH = 64


@contextlib.contextmanager
def claim_workdir(config: ConfigDict, workdir: str) -> Iterator[None]:
    """Holds the workdir for this run, with the config that belongs to it written there.

    Of several processes the first one holds it; the others wait until it does.

    Raises:
      UserError: another run works in it, or it was made with another config.
      OSError: it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if processes.is_writer():
            stack.enter_context(_claimed(config, workdir))
        processes.barrier("workdir claimed")
        yield


@contextlib.contextmanager
def _claimed(config: ConfigDict, workdir: str) -> Iterator[None]:
    path = Path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is at work in {path}; use another --workdir") from error
        stored = path / "config.json"
        if stored.exists():
            changed = config_lib.differences(
                config_lib.load(str(stored)), config, _sections_in_use(config, path)
            )
            if changed:
                raise UserError(
                    f"{path} was made with another config ({'; '.join(changed)}). "
                    "Put the values back to go on, or use another --workdir"
                )
        checkpoint.claim(config, workdir)
        scratch = stored.with_suffix(".tmp")
        scratch.write_text(config_lib.to_json(config) + "\n", encoding="utf-8")
        scratch.replace(stored)
        yield


def _sections_in_use(config: ConfigDict, workdir: Path) -> tuple[str, ...]:
    """Beginnings of the config keys on which something in the workdir depends already."""
    if checkpoint.exist(config, str(workdir)):
        return ("",)
    if (workdir / "autoencoder").exists():
        crops = ("random_crop", "flip", "num_crops", "cache_text_features")
        return (
            *("seed", "data.name", "data.image_size", "autoencoder."),
            *(f"data.{field}" for field in crops if (workdir / "codes").exists()),
        )
    return ("-",)


def train_autoencoder(config: ConfigDict, workdir: str) -> None:
    """Stage one alone."""
    stage_one.check(config, workdir)
    with claim_workdir(config, workdir):
        stage_one.prepare(config, workdir, encode.data_set(config))


def train(config: ConfigDict, workdir: str) -> None:
    """Both stages, or what is left of them; ends with likelihoods and a grid of pictures."""
    stage_one.check(config, workdir)
    for where in config.data.more_codes:
        codes.open_split(str(Path(where) / encode.TRAIN))
    with claim_workdir(config, workdir):
        builder = encode.data_set(config)
        autoencoder_params = stage_one.prepare(config, workdir, builder)
        content = encode.content(config, pretrained.text_features(config))
        mixed = [
            encode.open_split(config, where, encode.TRAIN, autoencoder_params, content)
            for where in config.data.more_codes
        ]
        names = {"train": "train", "validation": sets.evaluation_split(builder)}
        splits = {
            name: encode.open_or_make(config, workdir, builder, split, autoencoder_params, content)
            for name, split in names.items()
        }
        _train(config, workdir, splits, mixed, autoencoder_params)


def _train(config, workdir, splits, mixed, autoencoder_params) -> None:
    c = config.training
    mesh = sharding.make_mesh(config)
    sharding.warn_of_slow_dtype(config, mesh.devices.flat[0])
    sharding.require_divisible("training.batch_size", c.batch_size, mesh, c.gradient_accumulation)
    rows = c.batch_size // jax.process_count()
    dataset = batches.code_dataset(
        [splits["train"], *mixed],
        rows,
        config.seed,
        c.null_text_rate,
        weights=tuple(config.data.weights) or None,
    )
    evaluation = Evaluation(config, workdir, splits, autoencoder_params, mesh)

    def evaluate(step, state, writer):
        if step == c.num_steps:
            evaluation.run(step, state, writer, ["train", "validation"], f"{workdir}/samples.png")
        else:
            evaluation.run(step, state, writer, ["validation"])

    loop.fit(
        "training",
        functools.partial(state_lib.create_state, config),
        state_lib.jit_train_step(config, mesh),
        dataset,
        directory=workdir,
        prefix="train",
        checkpoints=str(checkpoint.folder(config, workdir)),
        config=config,
        mesh=mesh,
        placed=state_lib.state_shardings(config, mesh),
        prepare=functools.partial(state_lib.adopt, config),
        steps_per_call=c.steps_per_call,
        profile_steps=c.profile_steps,
        num_steps=c.num_steps,
        batch_size=c.batch_size,
        log_every=c.log_every,
        save_every=c.save_every,
        keep_checkpoints=c.keep_checkpoints,
        eval_every=c.eval_every,
        evaluate=evaluate,
    )


def _condition(record: CachedRecord, config: ConfigDict) -> np.ndarray:
    """The first caption's ids [L], or the label [], or 0 where there is no condition."""
    if config.denoiser.condition == "text":
        return record.text_ids[0]
    return np.int32(record.label if config.denoiser.condition == "class" else 0)


class Evaluation:
    """Likelihoods and pictures of the averaged parameters; compiles each function once.

    All devices share in the likelihoods. Of several processes, the first one draws the pictures.
    """

    def __init__(self, config, workdir, splits, autoencoder_params, mesh):
        self._mesh = mesh
        self._config = config
        self._workdir = workdir
        self._pipeline = VQDiffusion(config, None, autoencoder_params)
        self._sets = {}
        for split, cached in splits.items():
            count = min(config.evaluation.num_images, len(cached))
            rows = np.sort(np.random.default_rng(0).permutation(len(cached))[:count])
            records = cached.read(rows)
            self._sets[split] = (
                np.stack([record.codes[0] for record in records]).astype(np.int32),
                np.stack([_condition(record, config) for record in records]).astype(np.int32),
            )
        model_config = config_lib.model_config(config)
        schedule = config_lib.noise_schedule(config)

        def bits(params, key_data, codes, conditions):
            key = jax.random.wrap_key_data(key_data)
            model = conditioned.bind(model_config, params, placement=sharding.placement(mesh))
            context = model.context(conditions)

            def predict(tokens, time):
                return model.denoiser.denoise(tokens, model.denoiser.modulations(time), context)

            draws = min(config.evaluation.num_draws, schedule.num_steps)
            return objective.likelihood(key, predict, codes, schedule, draws)

        self._compiled_bits = jax.jit(bits, out_shardings=sharding.replicated(mesh))

    def _bits(self, params, key, codes, conditions):
        rows = sharding.put_rows((codes, conditions), self._mesh)
        key_data = np.asarray(jax.random.key_data(key))
        return self._compiled_bits(params, key_data, *rows)

    def _batch_size(self) -> int:
        """The same on all usual meshes, and with it the noise that the pictures meet."""
        shards = sharding.num_row_shards(self._mesh)
        return -(-LIKELIHOOD_BATCH // shards) * shards

    def run(self, step, state, writer, splits, grid_path=None) -> None:
        """Writes likelihoods of the splits, and a grid of the config's prompts."""
        values = {}
        for split in splits:
            codes, conditions = self._sets[split]
            result = caption_likelihood(
                functools.partial(self._bits, state.ema_params),
                codes,
                conditions,
                seed=0,
                batch_size=self._batch_size(),
            )
            values[f"{split}/bits_per_token"] = result.right
            if self._config.denoiser.condition == "none":
                logging.info(
                    "step %d, %d %s pictures: %.3f bits a token",
                    step, len(codes), split, result.right,
                )  # fmt: skip
                continue
            values |= {
                f"{split}/bits_per_token_shuffled": result.shuffled,
                f"{split}/shuffled_over_right": result.shuffled / result.right,
                f"{split}/difference_in_standard_errors": result.difference_in_standard_errors,
            }
            logging.info(
                "step %d, %d %s pictures: %.3f bits a token with right %s, %.3f with "
                "shuffled ones (%.2f times; the difference is %.1f standard errors)",
                step, len(codes), split, result.right,
                "classes" if self._config.denoiser.condition == "class" else "captions",
                result.shuffled, result.shuffled / result.right,
                result.difference_in_standard_errors,
            )  # fmt: skip
        writer.write(step, values)
        params = state.ema_params
        if jax.process_count() > 1:
            # A leaf at a time: no device holds the whole model.
            params = sharding.fetch(params)
        if processes.is_writer():
            self._draw(step, params, writer, grid_path)

    def _draw(self, step, params, writer, grid_path) -> None:
        sampling = self._config.sampling
        made = self._pipeline.with_params(params).generate(
            sampling.prompts, num_images=sampling.images_per_prompt, seed=self._config.seed
        )
        picture = images.grid(made.pixels, sampling.prompts)
        path = grid_path or f"{self._workdir}/samples/step_{step:07d}.png"
        images.save(path, picture)
        writer.image(step, "samples", np.asarray(picture))
        logging.info("pictures of step %d: %s", step, path)
