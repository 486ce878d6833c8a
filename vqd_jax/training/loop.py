"""The loop that both stages share: resume, step, log, save, stop cleanly.

Nothing here knows what is trained: a step is (state, batch) -> (state, metrics).
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
from absl import logging
from ml_collections import ConfigDict

from vqd_jax.errors import UserError
from vqd_jax.training.checkpoint import Checkpoints, abstract
from vqd_jax.training.metrics import MetricWriter, progress_bar


class Terminated(Exception):
    """SIGTERM arrived; everything up to the last step is saved."""


class _SigtermFlag:
    """Within the context, SIGTERM sets ``raised`` instead of ending the process."""

    def __enter__(self):
        self.raised = False
        self._old = signal.signal(signal.SIGTERM, self._set)
        return self

    def _set(self, *_):
        self.raised = True

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, self._old)


def fit(
    name: str,
    create_state: Callable[[], Any],
    train_step: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]],
    dataset: grain.IterDataset,
    *,
    directory: str,
    prefix: str,
    config: ConfigDict,
    num_steps: int,
    batch_size: int,
    log_every: int,
    save_every: int,
    keep_checkpoints: int,
    eval_every: int | None = None,
    evaluate: Callable[[int, Any, MetricWriter], None] | None = None,
) -> Any:
    """Trains from the newest checkpoint in ``directory/checkpoints``, or from the start.

    Args:
      name: what the progress bar calls it.
      create_state: makes the state before the first step; has a field ``step``. Jittable.
      train_step: compiled step that consumes its state. Its metrics have ``loss`` and
        ``gradient_norm``.
      dataset: batches; its iterator's position is saved beside the state.
      directory: where checkpoints, metrics.jsonl and event files go.
      prefix: of metric names, such as 'train'.
      config: saved in every checkpoint.
      num_steps, batch_size, log_every, save_every, keep_checkpoints: numbers of the run.
      eval_every, evaluate: (step, state, writer) is evaluated every so many steps and after the
        last; must not consume the state.

    Returns:
      The state after ``num_steps`` steps; a checkpoint of it is on disk.

    Raises:
      UserError: the loss is not finite, or no checkpoint can be read.
      Terminated: after SIGTERM, once the state is saved.
    """
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(f"{directory}/checkpoints", keep_checkpoints)
        # Whatever ends the run, a write that has begun is completed.
        stack.callback(checkpoints.close)
        iterator = iter(dataset)
        if checkpoints.latest_step is None:
            state = jax.jit(create_state)()
        else:
            state = checkpoints.restore(abstract(jax.eval_shape(create_state)), iterator)
        step = int(state.step)
        if step >= num_steps:
            logging.info(
                "%s is done (%d steps in %s); nothing is left to do", name, step, directory
            )
            return state
        if step:
            logging.info("%s goes on from step %d in %s", name, step, directory)

        writer = stack.enter_context(contextlib.closing(MetricWriter(directory, step)))
        sigterm = stack.enter_context(_SigtermFlag())
        bar = stack.enter_context(progress_bar(name, num_steps, step))
        speed = _Speed(batch_size)
        last = None
        while step < num_steps and not sigterm.raised:
            state, metrics = train_step(state, next(iterator))
            step += 1
            due = lambda every, step=step: step == num_steps or every and step % every == 0  # noqa: E731
            # The step before is finished by now, so that reading it does not hold this one up.
            _require_finite(last, checkpoints)
            last = step, metrics
            if due(log_every) or due(save_every) or due(eval_every):
                _require_finite(last, checkpoints)
            speed.count()
            if due(log_every):
                values = {key: float(value) for key, value in metrics.items()}
                values["images_per_second"] = speed.read()
                writer.write(step, {f"{prefix}/{key}": value for key, value in values.items()})
                shown = "loss {loss:.3f}, {images_per_second:.0f} images/s".format(**values)
                bar.set_postfix_str(shown, refresh=False)
            bar.update()
            with speed.paused():
                # Before the save: what a kill cuts off in here is done again after the restart.
                if evaluate and due(eval_every) and not sigterm.raised:
                    evaluate(step, state, writer)
                if due(save_every):
                    checkpoints.save(step, state, iterator, config.to_dict())
        if sigterm.raised:
            _require_finite(last, checkpoints)
            checkpoints.save(step, state, iterator, config.to_dict())
            raise Terminated(f"stopped by SIGTERM at step {step}; the same command goes on")
        return state


class _Speed:
    """Images a second since the last reading, pauses left out."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._start, self._steps = time.perf_counter(), 0

    def count(self) -> None:
        self._steps += 1

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
    loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
    if math.isfinite(loss) and math.isfinite(norm):
        return
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
