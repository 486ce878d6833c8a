"""The loop that both stages share: resume, step, log, save, stop cleanly.

Nothing here knows what is trained: a step is (state, batch) -> (state, metrics). The loop is the
same for one process and for many, which all run it.
"""

import contextlib
import functools
import signal
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqd_jax.checkpoint import Checkpoints
from vqd_jax.data import order
from vqd_jax.errors import UserError
from vqd_jax.parallel import sharding
from vqd_jax.training.metrics import MetricWriter, progress_bar


class Terminated(Exception):
    """SIGTERM arrived; everything up to the last step is saved."""


class _SigtermFlag:
    """Within the context, SIGTERM sets ``raised`` instead of ending the process.

    Among several processes the one that gets the signal tells the others, and all stop after the
    same call of the step: JAX's preemption service, which has taken the signal over, agrees on one.
    """

    def __enter__(self):
        self.raised = False
        self._calls = 0
        self._alone = jax.process_count() == 1
        if self._alone:
            self._old = signal.signal(signal.SIGTERM, self._set)
        return self

    def _set(self, *_):
        self.raised = True

    def after_call(self) -> None:
        """To be called after every call of the step, by all processes."""
        self._calls += 1
        if not self._alone:
            self.raised = multihost_utils.reached_preemption_sync_point(self._calls)

    def __exit__(self, *_):
        if self._alone:
            signal.signal(signal.SIGTERM, self._old)


def fit(
    name: str,
    create_state: Callable[[], Any],
    train_step: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]],
    dataset: grain.IterDataset,
    *,
    directory: str,
    prefix: str,
    checkpoints: str | None = None,
    config: ConfigDict,
    mesh: Mesh,
    placed: Any,
    num_steps: int,
    batch_size: int,
    log_every: int,
    save_every: int,
    keep_checkpoints: int,
    steps_per_call: int = 1,
    profile_steps: int = 0,
    prepare: Callable[[Any], Any] | None = None,
    eval_every: int | None = None,
    evaluate: Callable[[int, Any, MetricWriter], None] | None = None,
) -> Any:
    """Trains from the newest checkpoint, or from the start.

    Args:
      name: what the progress bar calls it.
      create_state: makes the state before the first step; has a field ``step``. Jittable.
      train_step: compiled step that consumes its state. Its metrics have ``loss`` and
        ``gradient_norm``. With ``steps_per_call`` S > 1 it takes S batches, stacked, and its
        metrics are of S steps.
      dataset: batches of NumPy arrays, this process's rows of them; its iterator's position is
        saved beside the state.
      directory: where metrics.jsonl and event files go.
      prefix: of metric names, such as 'train'.
      checkpoints: where they are, maybe in a bucket; None is ``directory/checkpoints``.
      config: saved in every checkpoint.
      mesh: the devices of all processes; the rows of batches are spread over it.
      placed: shardings of the state, or one of all of it. A checkpoint may come from another mesh.
      num_steps, log_every, save_every, keep_checkpoints: numbers of the run. What is due between
        the steps of one call is done after it.
      batch_size: rows of a batch of all processes.
      steps_per_call: S, a divisor of what is left of ``num_steps``.
      profile_steps: so many steps, after the first calls, are traced to ``directory/profile``.
      prepare: applied to the state of a run that begins.
      eval_every, evaluate: (step, state, writer) is evaluated every so many steps and after the
        last; must not consume the state.

    Returns:
      The state after ``num_steps`` steps; a checkpoint of it is on disk.

    Raises:
      UserError: the loss is not finite, or no checkpoint can be read.
      Terminated: after SIGTERM, once the state is saved.
    """
    with contextlib.ExitStack() as stack:
        saved = Checkpoints(checkpoints or f"{directory}/checkpoints", keep_checkpoints)
        # Whatever ends the run, a write that has begun is completed.
        stack.callback(saved.close)
        fetch = functools.partial(_next_batches, mesh=mesh, count=steps_per_call)
        iterator = iter(order.Ahead(dataset, fetch))
        if saved.latest_step is None:
            # Made where it lives: no device and no host ever holds the whole of it.
            state = jax.jit(create_state, out_shardings=placed)()
            state = prepare(state) if prepare else state
        else:
            abstract = sharding.with_shardings(jax.eval_shape(create_state), placed)
            state = saved.restore(abstract, iterator)
        step = int(jax.device_get(state.step))
        if step >= num_steps:
            logging.info(
                "%s is done (%d steps in %s); nothing is left to do", name, step, directory
            )
            return state
        if (num_steps - step) % steps_per_call:
            raise UserError(
                f"config.training.steps_per_call={steps_per_call} does not divide the "
                f"{num_steps - step} steps that are left; choose a divisor"
            )
        if step:
            logging.info("%s goes on from step %d in %s", name, step, directory)

        writer = stack.enter_context(contextlib.closing(MetricWriter(directory, step)))
        sigterm = stack.enter_context(_SigtermFlag())
        bar = stack.enter_context(progress_bar(name, num_steps, step))
        profiler = stack.enter_context(
            _Profiler(f"{directory}/profile", profile_steps, steps_per_call)
        )
        speed = _Speed(batch_size)
        last = None
        while step < num_steps and not sigterm.raised:
            state, metrics = train_step(state, next(iterator))
            before, step = step, step + steps_per_call
            sigterm.after_call()
            profiler.after_call(metrics)
            due = functools.partial(_due, before, step, num_steps)
            # The step before is finished by now, so that reading it does not hold this one up.
            _require_finite(last, saved)
            last = step, metrics
            if due(log_every) or due(save_every) or due(eval_every):
                _require_finite(last, saved)
            speed.count(steps_per_call)
            if due(log_every):
                values = {k: float(np.ravel(v)[-1]) for k, v in jax.device_get(metrics).items()}
                values["images_per_second"] = speed.read()
                writer.write(step, {f"{prefix}/{key}": value for key, value in values.items()})
                shown = "loss {loss:.3f}, {images_per_second:.0f} images/s".format(**values)
                bar.set_postfix_str(shown, refresh=False)
            bar.update(steps_per_call)
            with speed.paused():
                # Before the save: what a kill cuts off in here is done again after the restart.
                if evaluate and due(eval_every) and not sigterm.raised:
                    evaluate(step, state, writer)
                if due(save_every):
                    saved.save(step, state, iterator, config.to_dict())
        if sigterm.raised:
            _require_finite(last, saved)
            saved.save(step, state, iterator, config.to_dict())
            raise Terminated(f"stopped by SIGTERM at step {step}; the same command goes on")
        return state


def _due(before: int, step: int, last: int, every: int | None) -> bool:
    """Whether the call that went from ``before`` to ``step`` passed a multiple, or is the last."""
    return step == last or bool(every) and before // every < step // every


def _next_batches(iterator, mesh: Mesh, count: int) -> Any:
    """The next batch on the mesh; of more than one, their stack."""
    if count == 1:
        return sharding.put_batch(next(iterator), mesh)
    batches = [next(iterator) for _ in range(count)]
    return sharding.put_batch(jax.tree.map(lambda *x: np.stack(x), *batches), mesh, leading=1)


class _Profiler:
    """Traces some calls of the step, for TensorBoard's profiler or Perfetto."""

    # The first calls compile, and fill what runs ahead.
    _WARM_UP = 3

    def __init__(self, directory: str, num_steps: int, steps_per_call: int):
        self._directory = directory
        self._num_calls = -(-num_steps // steps_per_call)
        self._calls = 0
        self._tracing = False

    def after_call(self, metrics: Any) -> None:
        """To be called after every call of the step."""
        if not self._num_calls:
            return
        self._calls += 1
        if self._calls == self._WARM_UP:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(self._directory)
            self._tracing = True
        elif self._calls == self._WARM_UP + self._num_calls:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            logging.info("the trace of %d calls is in %s", self._num_calls, self._directory)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()


class _Speed:
    """Images a second since the last reading, pauses left out."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._start, self._steps = time.perf_counter(), 0

    def count(self, steps: int) -> None:
        self._steps += steps

    def read(self) -> float:
        now = time.perf_counter()
        speed = self._steps * self._batch_size / (now - self._start)
        self._start, self._steps = now, 0
        return speed

    @contextlib.contextmanager
    def paused(self):
        pause = time.perf_counter()
        yield
        self._start += time.perf_counter() - pause


def _require_finite(pending: tuple[int, dict] | None, checkpoints: Checkpoints) -> None:
    if pending is None:
        return
    step, metrics = pending
    losses, norms = (np.ravel(jax.device_get(metrics[key])) for key in ("loss", "gradient_norm"))
    bad = ~(np.isfinite(losses) & np.isfinite(norms))
    if not bad.any():
        return
    first = int(np.argmax(bad))
    step -= len(losses) - 1 - first
    loss, norm = float(losses[first]), float(norms[first])
    checkpoints.wait()
    latest = checkpoints.latest_step
    good = (
        "there is no checkpoint yet"
        if latest is None
        else f"the last good checkpoint is {checkpoints.directory / str(latest)}"
    )
    raise UserError(
        f"the loss is {loss} and the gradient norm {norm} at step {step}; {good}. "
        "Lower the learning rate (a run may go on with another one) and run the command again"
    )
