"""Checkpoints of a run: state, place in the data, config. The only module that imports Orbax."""

import contextlib
import errno
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax import files
from vqd_jax.errors import UserError
from vqd_jax.parallel import processes, sharding


def folder(config: ConfigDict, workdir: str) -> epath.Path:
    """Where the checkpoints of the denoiser's training are; it may be in a bucket."""
    return _absolute(config.training.checkpoints or os.path.join(workdir, "checkpoints"))


def claim(config: ConfigDict, workdir: str) -> None:
    """Makes the folder of the checkpoints, if it is not in the workdir.

    Raises:
      UserError: it cannot be written, or holds checkpoints of a run with another config.
    """
    if not config.training.checkpoints:
        return
    path = folder(config, workdir)
    name = f"config.training.checkpoints={config.training.checkpoints}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").write_text("")
        (path / ".writable").unlink()
    except Exception as error:  # A bucket's client raises many kinds.
        raise UserError(f"{name} cannot be written: {_reason(error)}") from error
    for step in _steps(path):
        try:
            stored = json.loads((path / str(step) / "config" / "metadata").read_text())
        except (OSError, ValueError):
            # This one is damaged. One that can be read decides.
            continue
        except Exception as error:  # A bucket's client raises many kinds.
            raise UserError(f"{name} cannot be read: {_reason(error)}") from error
        source = str(path / str(step))
        changed = config_lib.differences(config_lib.from_dict(stored, source), config)
        if changed:
            raise UserError(
                f"{name} holds checkpoints of a run with another config ({'; '.join(changed)}); "
                "give every run a folder of its own"
            )
        return


def exist(config: ConfigDict, workdir: str) -> bool:
    """Whether there is a checkpoint to go on from."""
    return bool(_steps(folder(config, workdir)))


class Restored(NamedTuple):
    """A state, and the step that it was saved at."""

    step: int
    state: Any


class Checkpoints:
    """The checkpoints ``directory/<step>``, written in the background, the newest few kept.

    A complete checkpoint is renamed into place or, in a bucket, marked by a file: one that was cut
    off is never taken for a checkpoint, and is removed.
    """

    def __init__(self, directory: str, keep: int = 2):
        self.directory = _absolute(directory)
        policies = ocp.checkpoint_managers
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                save_decision_policy=policies.FixedIntervalPolicy(1),
                preservation_policy=policies.LatestN(keep),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint that the first process sees; all must ask."""
        found = self._manager.latest_step()
        step = processes.of_first(-1 if found is None else found)
        return None if step < 0 else step

    def save(self, step: int, state: Any, iterator: grain.DatasetIterator, config: dict) -> None:
        """Begins to write a checkpoint; returns when ``state`` may be overwritten.

        An error of the write before it is raised here or by ``wait``.
        """
        if step in self._manager.all_steps():
            return
        with self._write_errors():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    # A place that all processes share, so that their number may change.
                    data=ocp.args.JsonSave(iterator.get_state()),
                    config=ocp.args.JsonSave(config),
                ),
            )

    def wait(self) -> None:
        """Returns when everything is on disk."""
        with self._write_errors():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _write_errors(self):
        try:
            yield
        except Exception as error:  # TensorStore reports a full disk as a ValueError.
            remedy = files.advice(error)
            raise UserError(
                f"a checkpoint could not be written to {self.directory}: "
                f"{_reason(error)}. The newest complete one is of step {self.latest_step}; "
                f"{remedy}{' and ' if remedy else ''}run the same command again"
            ) from error

    def restore(self, abstract_state: Any, iterator: grain.DatasetIterator) -> Any:
        """The newest readable state; ``iterator`` is put to its place in the data.

        A checkpoint counts as readable if all processes can read it. It may have been written by
        another number of them, on another mesh. Damaged ones are put aside.

        Args:
          abstract_state: pytree of ``jax.ShapeDtypeStruct``, with shardings.
          iterator: an iterator over the same data set.

        Raises:
          UserError: no checkpoint can be read, the newest one is of another model, or the storage
            does not answer.
        """

        def read(step):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract_state),
                    data=ocp.args.JsonRestore(),
                ),
            )
            iterator.set_state(restored.data)
            return restored.state

        steps = _agreed(sorted(self._manager.all_steps(), reverse=True))
        found = _newest_readable(self.directory, steps, read, abstract_state)
        damaged = [step for step in steps if step > found.step]
        if damaged:
            self._put_aside(damaged)
        return found.state

    def _put_aside(self, steps: list[int]) -> None:
        """Renames damaged checkpoints, because the run saves these steps again."""
        if processes.is_writer():
            for step in steps:
                (self.directory / str(step)).rename(self.directory / f"{step}.damaged")
        processes.barrier("damaged checkpoints put aside")
        self._manager.reload()

    def close(self) -> None:
        """Waits for the writes and stops the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()


def load(directory: str | epath.Path, abstract_state: Any) -> Restored:
    """Reads the newest readable state for use, not for going on.

    Args:
      directory: where ``Checkpoints`` wrote.
      abstract_state: pytree of ``jax.ShapeDtypeStruct``; a dict of some fields reads these alone.

    Raises:
      UserError: there is no checkpoint, or none can be read; see ``Checkpoints.restore``.
    """
    path = _absolute(str(directory))
    steps = _agreed(_steps(path))
    if not steps:
        raise UserError(f"no checkpoint in {path}; train first: run without --mode=sample")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:

        def read(step):
            args = ocp.args.PyTreeRestore(
                abstract_state,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state),
                partial_restore=True,
            )
            return reader.restore(path / str(step) / "state", args=args)

        return _newest_readable(path, steps, read, abstract_state)


def abstract(tree: Any) -> Any:
    """Shapes and dtypes of a pytree, placed on the first device of this process."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _absolute(directory: str) -> epath.Path:
    scheme, separator, _ = directory.partition("://")
    if not separator:
        # Orbax refuses relative paths, but only once it saves.
        return epath.Path(os.path.abspath(directory))
    if scheme != "gs":
        raise UserError(f"{directory}: checkpoints go to a folder or to gs://BUCKET/...")
    if not importlib.util.find_spec("gcsfs"):
        raise UserError(f"{directory} needs gcsfs: pip install 'vqd_jax[gcs]'")
    return epath.Path(directory)


def _agreed(steps: list[int]) -> list[int]:
    """The steps that the first process sees: a storage may show other processes older ones."""
    count = processes.of_first(len(steps))
    return [processes.of_first(steps[i] if i < len(steps) else -1) for i in range(count)]


def _steps(path: epath.Path) -> list[int]:
    """Steps of the complete checkpoints, the newest first."""
    try:
        steps = [child for child in path.iterdir() if child.name.isdigit()] if path.exists() else []
        # In a bucket nothing is renamed: there a file says that a checkpoint is complete.
        complete = (int(step.name) for step in steps if ocp.utils.is_checkpoint_finalized(step))
        return sorted(complete, reverse=True)
    except Exception as error:  # A bucket's client raises many kinds.
        raise UserError(f"checkpoints of {path} cannot be listed: {_reason(error)}") from error


# Why a checkpoint cannot be used. If processes have different reasons, the largest counts.
_NOTHING, _DAMAGE, _OTHER_MODEL, _NO_ANSWER = range(4)
# TensorStore reports errors of the storage as ValueErrors.
_PASSING = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|Input/output error|Stale file handle|timed out"
)
# Seconds to wait before another attempt, after an error that may pass.
_PAUSES = (0.5, 1.0)


def _newest_readable(
    path: epath.Path, steps: list[int], read: Callable[[int], Any], abstract_state: Any
) -> Restored:
    """The first of ``steps``, the newest first, that all processes can read."""
    failures = []
    for step in steps:
        place = path / str(step)
        for pause in (*_PAUSES, 0.0):
            state, problem, changes = None, None, []
            # Processes read together, or a part of them would wait for the others in vain.
            if processes.largest(not place.exists()):
                problem = OSError(errno.ESTALE, "not all processes see it yet")
            else:
                try:
                    state = read(step)
                except Exception as error:  # Orbax and TensorStore raise many kinds.
                    problem = error
                    changes = _changes(place, abstract_state)
            verdict = processes.largest(_verdict(problem, changes))
            if verdict != _NO_ANSWER:
                break
            time.sleep(pause)
        if verdict == _NOTHING:
            return Restored(step, state)
        problem = problem or RuntimeError("another process cannot read it")
        if verdict == _OTHER_MODEL:
            shown = "; ".join(changes[:5]) + ("; ..." if changes[5:] else "")
            raise UserError(
                f"checkpoint {place} is of another model ({shown}). Put the config back to that of "
                "the run, or use another --workdir"
            ) from problem
        if verdict == _NO_ANSWER:
            raise UserError(
                f"checkpoint {place} cannot be read now: {_reason(problem)}. It is left as it is; "
                "run the same command again when the storage answers"
            ) from problem
        failures.append((step, problem))
        logging.warning("checkpoint %s cannot be read, trying another: %s", place, _reason(problem))
    tried = ", ".join(str(step) for step, _ in failures)
    raise UserError(
        f"no checkpoint in {path} can be read (steps {tried}; {_reason(failures[0][1])}). They are "
        "damaged; restore them or use another --workdir"
    )


def _verdict(problem: Exception | None, changes: list[str]) -> int:
    if problem is None:
        return _NOTHING
    missing = FileNotFoundError, NotADirectoryError, IsADirectoryError
    of_system = isinstance(problem, OSError) and not isinstance(problem, missing)
    if of_system or _PASSING.search(str(problem)):
        return _NO_ANSWER
    return _OTHER_MODEL if changes else _DAMAGE


def _changes(path: epath.Path, abstract_state: Any) -> list[str]:
    """'name: stored -> wanted' for every array whose shape is not the stored one."""
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            stored = _shapes(reader.metadata(path / "state").item_metadata)
    except Exception:  # Damaged metadata tell nothing; Orbax raises many kinds.
        return []
    if not stored:
        return []
    wanted = _shapes(abstract_state)
    parts = {name.split(".")[0] for name in wanted}
    # Parts that nobody asks for may be there.
    stored = {name: shape for name, shape in stored.items() if name.split(".")[0] in parts}
    return files.differences(stored, wanted)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        sharding.dotted(path): tuple(leaf.shape)
        for path, leaf in leaves
        # A PRNG key is stored as its data, which have another shape.
        if hasattr(leaf, "shape") and sharding.dotted(path) != "key"
    }


def _reason(error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first.split(" See full TensorStore details")[0][:500]
