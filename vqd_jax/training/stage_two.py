"""Stage two: trains the denoiser on the codes of stage one.

Letters: B batch, N image tokens, L text positions, A parts of a batch.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import struct
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqd_jax import checkpoint
from vqd_jax import config as config_lib
from vqd_jax.data import batches, codes, encode, images, sets
from vqd_jax.diffusion import objective
from vqd_jax.evaluation import likelihood
from vqd_jax.evaluation.progress import Progress
from vqd_jax.interop import pretrained
from vqd_jax.models import adapters, conditioned
from vqd_jax.models.attention import ONE_DEVICE, Placement
from vqd_jax.parallel import processes, sharding
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.training import best, loop, optimizer, stage_one
from vqd_jax.training import task as task_lib
from vqd_jax.training.metrics import MetricWriter
from vqd_jax.training.task import Task
from vqd_jax.training.workdir import claim

# (key, predict_log_x0, batch, time statistics, config) -> the loss, float32 [], and a pair of the
# next statistics and metrics.
Loss = Callable[..., tuple[jax.Array, tuple[objective.TimeStatistics, dict[str, jax.Array]]]]

# What a batch calls the condition of the denoiser, by config.denoiser.condition.
CONDITION_KEYS = {"text": "text_ids", "class": "label", "none": None}


class TrainState(struct.PyTreeNode):
    """Everything that a step reads or changes; a checkpoint of it is a complete one.

    Attributes:
      step: int32 [], steps taken.
      params, ema_params: nested dicts of float32 arrays.
      opt_state: moments of the optimizer.
      time_statistics: what importance sampling of t has learnt.
      key: PRNG key of the run; a step uses ``fold_in(key, step)``.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: optax.OptState
    time_statistics: objective.TimeStatistics
    key: jax.Array


class AdaptedState(TrainState):
    """The state of a run in which adapters alone learn: ``params`` and ``ema_params`` are theirs.

    Attributes:
      frozen: the parameters of the model, which nothing changes.
    """

    frozen: Any = None


def complete(state: TrainState | None, params: Any) -> Any:
    """The parameters of the model, from ``params`` or ``ema_params`` of a state.

    Without a state, all of them are in ``params``.
    """
    frozen = getattr(state, "frozen", None)
    return params if frozen is None else adapters.merged(frozen, params)


def _optimizer(config: ConfigDict) -> tuple[optax.GradientTransformation, optax.Schedule]:
    is_frozen = config_lib.model_config(config).freeze_text_encoder
    frozen = ("text_encoder",) if is_frozen and not config.training.adapter_rank else ()
    return optimizer.make(config.training, frozen)


def create_state(config: ConfigDict) -> TrainState:
    """The state before the first step, decided by ``config.seed``; wrap it in ``jax.jit``."""
    init_key, key = jax.random.split(jax.random.key(config.seed))
    params = conditioned.init_params(config_lib.model_config(config), init_key)
    make, c = TrainState, config.training
    if c.adapter_rank:
        make = functools.partial(AdaptedState, frozen=params)
        key_of_adapters = jax.random.fold_in(init_key, 1)
        params = adapters.init(params, c.adapter_rank, c.adapter_paths, key_of_adapters)
    return make(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy: a donated state must not hold one buffer twice.
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=_optimizer(config)[0].init(params),
        time_statistics=objective.init_time_statistics(config.diffusion.num_steps),
        key=key,
    )


def abstract_batch(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and places on the mesh of one batch; see ``train_step``."""
    size, placed = config.training.batch_size, sharding.batch_sharding(mesh)
    grid = config_lib.model_config(config).denoiser.grid
    shapes = {
        "codes": (size, grid[0] * grid[1]),
        "text_ids": (size, config.text_encoder.context_length),
        "label": (size,),
    }
    wanted = "codes", CONDITION_KEYS[config.denoiser.condition]
    batch = {
        key: jax.ShapeDtypeStruct(shapes[key], jnp.int32, sharding=placed) for key in wanted if key
    }
    if config.data.cache_text_features:
        shape = (*shapes["text_ids"], config.text_encoder.width)
        batch["text_features"] = jax.ShapeDtypeStruct(shape, jnp.float16, sharding=placed)
    return batch


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    config: ConfigDict,
    placement: Placement = ONE_DEVICE,
    loss: Loss | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of the optimizer, and of the moving average.

    Args:
      state: of the step before.
      batch: ``codes`` int32 [B, N], and the condition: ``text_ids`` int32 [B, L] and, where they
        are cached, ``text_features`` [B, L, width] of the text encoder; or ``label`` int32 [B].
      config: the resolved config.
      placement: of the model on several devices.
      loss: what is minimised; None is ``bound``.

    Returns:
      The next state and float32 scalars: ``loss`` (nats a token), the metrics of the loss, such as
      ``bound_bits`` (the variational bound in bits a token) and ``accuracy`` of the most likely
      codes; ``gradient_norm`` before clipping, ``learning_rate``.
    """
    key = jax.random.fold_in(state.key, state.step)
    compute = functools.partial(
        _gradients, state.params, state=state, config=config, placement=placement, loss=loss
    )
    parts = config.training.gradient_accumulation
    gradients, statistics, metrics = task_lib.accumulate(
        compute, state.time_statistics, key, batch, parts
    )
    return updated(state, gradients, statistics, metrics, config)


def updated(
    state: TrainState,
    gradients: Any,
    statistics: objective.TimeStatistics,
    metrics: dict[str, jax.Array],
    config: ConfigDict,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after a step with these gradients of ``params``, and the metrics with its own."""
    transform, rate = _optimizer(config)
    with jax.named_scope("optimizer"):
        norm = optax.tree.norm(gradients)
        updates, opt_state = transform.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = optimizer.averaged(
            state.ema_params, params, config.training.ema_decay, state.step
        )
    return state.replace(
        step=state.step + 1,
        params=params,
        ema_params=ema_params,
        opt_state=opt_state,
        time_statistics=statistics,
    ), metrics | {"learning_rate": rate(state.step), "gradient_norm": norm}


def bound(key, predict, batch, statistics, config):
    """The variational bound as a ``Loss``."""
    loss, aux = objective.variational_bound(
        key,
        predict,
        batch["codes"],
        config_lib.noise_schedule(config),
        statistics,
        auxiliary_weight=config.training.auxiliary_weight,
    )
    metrics = {"bound_bits": aux["bound"] / jnp.log(2.0), "accuracy": aux["accuracy"]}
    return loss, (aux["statistics"], metrics)


def _gradients(params, statistics, key, batch, *, config, placement, state=None, loss=None):
    """Gradients, updated time statistics and metrics of a loss on some rows of a batch."""
    condition = batch.get(CONDITION_KEYS[config.denoiser.condition])
    if condition is not None:
        chex.assert_equal(batch["codes"].shape[0], condition.shape[0])
    model_config = config_lib.model_config(config)

    def loss_fn(params):
        whole = complete(state, params)
        model = conditioned.bind(model_config, whole, placement=placement)
        predict = model.predictor(condition, batch.get("text_features"))
        return (loss or bound)(key, predict, batch, statistics, config)

    (value, (statistics, metrics)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return gradients, statistics, {"loss": value} | metrics


class DenoiserTask(Task):
    """Stage two of a config.

    Args:
      config: the resolved config.
      dataset: batches as ``train_step`` takes them; None if none is trained on.
      evaluation: what is measured on the way; None is nothing.
    """

    name, prefix = "training", "train"

    def __init__(
        self,
        config: ConfigDict,
        dataset: grain.IterDataset | None = None,
        evaluation: "Evaluation | None" = None,
    ):
        self.batches = dataset
        self._config, self._evaluation = config, evaluation

    def create_state(self):
        return create_state(self._config)

    def train_step(self, state, batch, placement):
        return train_step(state, batch, config=self._config, placement=placement)

    def shardings(self, abstract, mesh):
        rules = (sharding.ADAPTER_RULE,) if self._config.training.adapter_rank else ()
        return sharding.shardings(abstract, mesh, (*rules, *sharding.RULES))

    def begin(self, state):
        model = state.frozen if self._config.training.adapter_rank else state.params
        found = pretrained.load_initial(self._config, model)

        def begun(params):
            return params | {n: sharding.put_like(params[n], part) for n, part in found.items()}

        if self._config.training.adapter_rank:
            return state.replace(frozen=begun(state.frozen))
        # Two copies: a donated state must not hold one buffer twice.
        return state.replace(params=begun(state.params), ema_params=begun(state.ema_params))

    def evaluate(self, step, state, writer):
        if self._evaluation:
            self._evaluation.run(step, complete(state, state.ema_params), writer)


def train_autoencoder(config: ConfigDict, workdir: str) -> None:
    """Stage one alone."""
    stage_one.check(config, workdir)
    with claim(config, workdir):
        builder = encode.data_set(config)
        stage_one.prepare(config, workdir, builder)
        stage_one.remap(config, workdir, builder)


def train(config: ConfigDict, workdir: str) -> None:
    """Both stages, or what is left of them; ends with likelihoods and a grid of pictures."""
    stage_one.check(config, workdir)
    for where in config.data.more_codes:
        codes.open_split(str(Path(where) / encode.TRAIN))
    with claim(config, workdir):
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
        _train(config, workdir, builder, splits, mixed, autoencoder_params)


def _train(config, workdir, builder, splits, mixed, autoencoder_params) -> None:
    c, mesh = config.training, sharding.make_mesh(config)
    sharding.warn_of_slow_dtype(config, mesh.devices.flat[0])
    sharding.require_divisible("training.batch_size", c.batch_size, mesh, c.gradient_accumulation)
    dataset = batches.code_dataset(
        [splits["train"], *mixed],
        c.batch_size // jax.process_count(),
        config.seed,
        c.null_text_rate,
        weights=tuple(config.data.weights) or None,
        record_weights=encode.record_weights(config, builder),
    )
    evaluation = Evaluation(config, workdir, splits, autoencoder_params, mesh)
    if c.evaluate_with:
        evaluation.progress = Progress(config, builder, workdir)
    place = loop.Place(workdir, str(checkpoint.folder(config, workdir)), mesh, config)
    task = DenoiserTask(config, dataset, evaluation)
    loop.fit(task, loop.Schedule.of(config), place)


class Evaluation:
    """Likelihoods and pictures of a model in training; compiles each function once.

    All devices share in the likelihoods. Among several processes, the first one draws the pictures.
    """

    def __init__(self, config, workdir, splits, autoencoder_params, mesh):
        self._config, self._workdir = config, workdir
        self._pipeline = VQDiffusion(config, None, autoencoder_params)
        self._sets = {
            name: likelihood.chosen(source, config.evaluation.num_images, config.denoiser.condition)
            for name, source in splits.items()
        }
        self._bound = likelihood.Bound(config, mesh)
        # What is measured of pictures, too; None is nothing.
        self.progress: Progress | None = None

    def run(self, step: int, params: Any, writer: MetricWriter) -> None:
        """Writes likelihoods and a grid of the config's prompts; at the last step, of all splits.

        Args:
          step: steps taken.
          params: the averaged parameters, on the mesh.
          writer: of the metrics.
        """
        is_last = step == self._config.training.num_steps
        values = {}
        for split in self._sets if is_last else self._sets.keys() & {"validation"}:
            values |= self._likelihood(step, params, split)
        if jax.process_count() > 1:
            # A leaf at a time: no device holds the whole model.
            params = sharding.fetch(params)
        if processes.is_writer():
            pipeline, c = self._pipeline.with_params(params), self._config.training
            values |= self.progress.measure(pipeline) if self.progress else {}
            writer.write(step, values)
            if c.best_metric:
                best.keep(self._workdir, c.best_metric, step, values, pipeline)
            name = "samples.png" if is_last else f"samples/step_{step:07d}.png"
            self._draw(step, params, writer, f"{self._workdir}/{name}")

    def _likelihood(self, step, params, split) -> dict[str, float]:
        codes, conditions = self._sets[split]
        found = self._bound(params, codes, conditions)
        about = f"step {step}, {len(codes)} {split} pictures: {found.right:.3f} bits a token"
        values = {f"{split}/bits_per_token": found.right}
        if self._config.denoiser.condition == "none":
            logging.info("%s", about)
            return values
        ratio = found.shuffled / found.right
        logging.info(
            "%s with right %s, %.3f with shuffled ones (%.2f times; the difference is "
            "%.1f standard errors)",
            about, "classes" if self._config.denoiser.condition == "class" else "captions",
            found.shuffled, ratio, found.difference_in_standard_errors,
        )  # fmt: skip
        return values | {
            f"{split}/bits_per_token_shuffled": found.shuffled,
            f"{split}/shuffled_over_right": ratio,
            f"{split}/difference_in_standard_errors": found.difference_in_standard_errors,
        }

    def _draw(self, step, params, writer, path) -> None:
        sampling = self._config.sampling
        made = self._pipeline.with_params(params).generate(
            sampling.prompts, num_images=sampling.images_per_prompt, seed=self._config.seed
        )
        picture = images.grid(made.pixels, sampling.prompts)
        images.save(path, picture)
        writer.image(step, "samples", np.asarray(picture))
        logging.info("pictures of step %d: %s", step, path)
