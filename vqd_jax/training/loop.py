"""The loop of every training: resume, step, log, evaluate, save, stop cleanly.

It knows no model; a task does (``task.py``). One process or many run the same loop.
"""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqd_jax import files
from vqd_jax.checkpoint import Checkpoints
from vqd_jax.data import order
from vqd_jax.errors import UserError
from vqd_jax.parallel import processes, sharding
from vqd_jax.training import task as task_lib
from vqd_jax.training.metrics import MetricWriter, progress_bar
from vqd_jax.training.task import Task


class Terminated(Exception):
    """SIGTERM arrived; everything up to the last step is saved."""


class _SigtermFlag:
    """Within the context, SIGTERM sets ``raised`` instead of ending the process.

    Among several processes the one that gets the signal tells the others, and all stop after the
    same step: JAX's preemption service, which has taken the signal over, agrees on one.
    """

    def __enter__(self):
        self.raised = False
        self._alone = jax.process_count() == 1
        if self._alone:
            self._old = signal.signal(signal.SIGTERM, self._set)
        return self

    def _set(self, *_):
        self.raised = True

    def after_steps(self, steps: Iterable[int]) -> None:
        """To be called by all processes after steps, with the number of each.

        The service compares numbers for equality, so none may be left out. Orbax tells it the step
        of every save; any other count than that of steps would miss what it agreed on.
        """
        if not self._alone:
            reached = [multihost_utils.reached_preemption_sync_point(step) for step in steps]
            self.raised = self.raised or any(reached)

    def __exit__(self, *_):
        if self._alone:
            signal.signal(signal.SIGTERM, self._old)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long a run is, and what is due when.

    Attributes:
      num_steps: of the run.
      batch_size: rows of a batch of all processes.
      log_every, eval_every, save_every: steps. All are due after the last step, too. What is due
        between the steps of one call is done after it.
      keep_checkpoints: how many are kept; the newest stay.
      steps_per_call: steps in one compiled program. The last call has those that are left.
      profile_steps: steps that are traced to ``directory/profile``, after the first calls.
    """

    num_steps: int
    batch_size: int
    log_every: int
    eval_every: int
    save_every: int
    keep_checkpoints: int
    steps_per_call: int = 1
    profile_steps: int = 0

    @classmethod
    def of(cls, config: ConfigDict, **changes: int) -> "Schedule":
        """That of ``config.training``, with some fields changed."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: config.training[name] for name in names} | changes)

    def due(self, every: int, before: int, step: int) -> bool:
        """Whether the call that went from ``before`` to ``step`` passed a multiple, or is last."""
        return step == self.num_steps or before // every < step // every

    def call_after(self, step: int) -> int:
        """The number of steps of the call that begins after ``step``."""
        return min(self.steps_per_call, self.num_steps - step)


class Place(NamedTuple):
    """Where a run lives.

    Attributes:
      directory: of metrics.jsonl and the event files.
      checkpoints: their folder, which may be in a bucket.
      mesh: the devices of all processes; the rows of batches are spread over it.
      config: it is saved in every checkpoint.
    """

    directory: str
    checkpoints: str
    mesh: Mesh
    config: ConfigDict


def fit(task: Task, schedule: Schedule, place: Place) -> Any:
    """Trains from the newest checkpoint, or from the start.

    A checkpoint may come from another mesh or another number of processes.

    Returns:
      The state after ``num_steps`` steps; a checkpoint of it is on disk.

    Raises:
      UserError: the loss is not finite, or no checkpoint can be read.
      Terminated: after SIGTERM, once the state is saved.
    """
    with contextlib.ExitStack() as stack:
        saved = Checkpoints(place.checkpoints, schedule.keep_checkpoints)
        # Whatever ends the run, a write that has begun is completed.
        stack.callback(saved.close)
        fetch = _Fetch(schedule, place.mesh)
        iterator = order.Ahead(iter(task.batches), fetch)
        if saved.latest_step is None:
            state = task.begin(task_lib.init_state(task, place.mesh))
        else:
            state = saved.restore(task_lib.abstract_state(task, place.mesh), iterator)
        step = int(jax.device_get(state.step))
        postponed = _Postponed(place.directory)
        is_postponed = postponed.at(step)
        if step >= schedule.num_steps and not is_postponed:
            done = f"{task.name} is done ({step} steps in {place.directory})"
            logging.info("%s; nothing is left to do", done)
            return state
        fetch.step = step
        if step:
            logging.info("%s goes on from step %d in %s", task.name, step, place.directory)
        writer = stack.enter_context(contextlib.closing(MetricWriter(place.directory, step)))
        if is_postponed:
            task.evaluate(step, state, writer)
            postponed.clear()
        run = stack.enter_context(_Run(task, schedule, place, saved, writer, step))
        return run.finish(state, iterator)


class _Run(contextlib.ExitStack):
    """The steps of one start of the program."""

    def __init__(self, task, schedule, place, saved, writer, step):
        super().__init__()
        self._task, self._schedule, self._saved, self._writer = task, schedule, saved, writer
        self._config = place.config.to_dict()
        self._step, self._postponed = step, _Postponed(place.directory)
        self._train_step = task_lib.jit_step(task, place.mesh, schedule.steps_per_call)
        self._sigterm = self.enter_context(_SigtermFlag())
        self._bar = self.enter_context(progress_bar(task.name, schedule.num_steps, step))
        self._profiler = self.enter_context(_Profiler(place.directory, schedule))
        self._speed = _Speed(schedule.batch_size, step)

    def finish(self, state: Any, iterator: grain.DatasetIterator) -> Any:
        """The state after the last step."""
        schedule, last = self._schedule, None
        while self._step < schedule.num_steps and not self._sigterm.raised:
            state, metrics = self._train_step(state, next(iterator))
            before, self._step = self._step, self._step + schedule.call_after(self._step)
            self._sigterm.after_steps(range(before + 1, self._step + 1))
            self._profiler.after_call(metrics)
            log, evaluate, save = (
                schedule.due(every, before, self._step)
                for every in (schedule.log_every, schedule.eval_every, schedule.save_every)
            )
            # The step before is finished by now, so that reading it does not hold this one up.
            _require_finite(last, self._saved)
            last = self._step, metrics
            if log or evaluate or save:
                _require_finite(last, self._saved)
            if log:
                self._log(metrics)
            self._bar.update(self._step - before)
            with self._speed.paused():
                # Before the save: what a kill cuts off in here is done again after the restart.
                if evaluate and self._sigterm.raised:
                    self._postponed.mark(self._step)
                elif evaluate:
                    self._task.evaluate(self._step, state, self._writer)
                if save:
                    self._saved.save(self._step, state, iterator, self._config)
        if self._sigterm.raised:
            _require_finite(last, self._saved)
            self._saved.save(self._step, state, iterator, self._config)
            raise Terminated(f"stopped by SIGTERM at step {self._step}; the same command goes on")
        return state

    def _log(self, metrics: dict[str, jax.Array]) -> None:
        values = {key: float(np.ravel(value)[-1]) for key, value in jax.device_get(metrics).items()}
        values["images_per_second"] = self._speed.read(self._step)
        named = {f"{self._task.prefix}/{key}": value for key, value in values.items()}
        self._writer.write(self._step, named)
        shown = "loss {loss:.3f}, {images_per_second:.0f} images/s".format(**values)
        self._bar.set_postfix_str(shown, refresh=False)


class _Postponed:
    """The evaluation that SIGTERM left no time for; the next start makes up for it."""

    def __init__(self, directory: str):
        self._path = Path(directory) / "postponed_evaluation.json"

    def mark(self, step: int) -> None:
        if processes.is_writer():
            files.write_json(self._path, {"step": step})

    def at(self, step: int) -> bool:
        """Whether it is that of this step; all processes must ask."""
        found = -1
        if processes.is_writer() and self._path.exists():
            found = files.read_json(self._path, "remove it")["step"]
        return processes.of_first(found) == step

    def clear(self) -> None:
        if processes.is_writer():
            self._path.unlink()


class _Fetch:
    """Puts the batches of one call after the other on the mesh, up to the last step of a run.

    Where calls have several steps, the batches of a call are stacked.
    """

    def __init__(self, schedule: Schedule, mesh: Mesh):
        self._schedule, self._mesh = schedule, mesh
        self.step = 0  # after which the next call begins

    def __call__(self, iterator: grain.DatasetIterator) -> Any:
        count = self._schedule.call_after(self.step)
        if count <= 0:
            raise StopIteration
        batches = [next(iterator) for _ in range(count)]
        self.step += count
        if self._schedule.steps_per_call == 1:
            return sharding.put_batch(batches[0], self._mesh)
        stack = jax.tree.map(lambda *x: np.stack(x), *batches)
        return sharding.put_batch(stack, self._mesh, leading=1)


class _Profiler(contextlib.ExitStack):
    """Traces some calls of the step, for TensorBoard's profiler or Perfetto."""

    # The first calls compile, and fill what runs ahead.
    _WARM_UP = 3

    def __init__(self, directory: str, schedule: Schedule):
        super().__init__()
        self._directory = f"{directory}/profile"
        self._num_calls = -(-schedule.profile_steps // schedule.steps_per_call)
        self._calls = 0

    def after_call(self, metrics: Any) -> None:
        """To be called after every call of the step."""
        self._calls += 1
        first, last = self._WARM_UP, self._WARM_UP + self._num_calls
        if self._num_calls and self._calls in (first, last):
            jax.block_until_ready(metrics)
            self.close()
            if self._calls == first:
                told = "the trace of %d calls is in %s"
                self.callback(logging.info, told, self._num_calls, self._directory)
                self.enter_context(jax.profiler.trace(self._directory))


class _Speed:
    """Images a second since the last reading, pauses left out."""

    def __init__(self, batch_size: int, step: int):
        self._batch_size = batch_size
        self._start, self._step = time.perf_counter(), step

    def read(self, step: int) -> float:
        now = time.perf_counter()
        speed = (step - self._step) * self._batch_size / (now - self._start)
        self._start, self._step = now, step
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
    # Every network has a norm: 'gradient_norm', 'discriminator_gradient_norm'.
    watched = [key for key in metrics if key == "loss" or key.endswith("gradient_norm")]
    values = {key: np.ravel(jax.device_get(metrics[key])) for key in watched}
    bad = ~np.isfinite(list(values.values())).all(axis=0)
    if not bad.any():
        return
    first = int(np.argmax(bad))
    step -= len(bad) - 1 - first
    norms = [float(v[first]) for key, v in values.items() if key != "loss"]
    # The norm that is not finite, if one is.
    loss, norm = float(values["loss"][first]), min(norms, key=np.isfinite)
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
