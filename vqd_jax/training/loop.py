"""The loop that both stages share: resume, step, log, save, stop cleanly.

Nothing here knows what is trained: a step is (state, batch) -> (state, metrics).
"""

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
    on_step: Callable[[int, Any, MetricWriter], None] = lambda step, state, writer: None,
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
      on_step: called after every step, before it is saved; its time does not count in images/s.

    Returns:
      The state after ``num_steps`` steps; a checkpoint of it is on disk.

    Raises:
      UserError: the loss is not finite, or no checkpoint can be read.
      Terminated: after SIGTERM, once the state is saved.
    """
    checkpoints = Checkpoints(f"{directory}/checkpoints", keep_checkpoints)
    iterator = iter(dataset)
    if checkpoints.latest_step is None:
        state = jax.jit(create_state)()
    else:
        state = checkpoints.restore(abstract(jax.eval_shape(create_state)), iterator)
        logging.info("%s goes on from step %d in %s", name, int(state.step), directory)
    step = int(state.step)
    writer = MetricWriter(directory, step)
    save = lambda: checkpoints.save(step, state, iterator, config.to_dict())  # noqa: E731

    with _SigtermFlag() as sigterm, progress_bar(name, num_steps, step) as bar:
        clock, timed_steps = time.perf_counter(), 0
        pending = None
        while step < num_steps and not sigterm.raised:
            state, metrics = train_step(state, next(iterator))
            step, timed_steps = step + 1, timed_steps + 1
            # The step before is finished by now, so that reading it does not hold this one up.
            _require_finite(pending, checkpoints)
            pending = step, metrics
            if step % log_every == 0 or step == num_steps:
                values = {key: float(value) for key, value in metrics.items()}
                seconds = time.perf_counter() - clock
                values["images_per_second"] = timed_steps * batch_size / seconds
                clock, timed_steps = time.perf_counter(), 0
                writer.write(step, {f"{prefix}/{key}": value for key, value in values.items()})
                bar.set_postfix_str(
                    f"loss {values['loss']:.3f}, {values['images_per_second']:.0f} images/s",
                    refresh=False,
                )
            bar.update()
            pause = time.perf_counter()
            # Before the save: what a kill cuts off here is done again from the checkpoint before.
            on_step(step, state, writer)
            clock += time.perf_counter() - pause
            if step % save_every == 0 or step == num_steps or sigterm.raised:
                _require_finite(pending, checkpoints)
                save()
        checkpoints.close()
        writer.close()
        if step < num_steps:
            raise Terminated(f"stopped by SIGTERM after step {step}; run the same command to go on")
    return state


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
        "Lower the learning rate or the clipping norm and go on from there"
    )
