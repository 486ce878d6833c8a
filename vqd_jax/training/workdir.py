"""The folder of a run: held by one run at a time, with the config that belongs to it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from vqd_jax import checkpoint, files
from vqd_jax import config as config_lib
from vqd_jax.errors import UserError
from vqd_jax.parallel import processes


@contextlib.contextmanager
def claim(config: ConfigDict, workdir: str) -> Iterator[None]:
    """Holds the workdir for this run, and writes the run's config there.

    Among several processes, the first one holds it; the others wait until it does.

    Raises:
      UserError: another run works in it, or it was made with another config.
      OSError: it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if processes.is_writer():
            stack.enter_context(_claimed(config, Path(workdir)))
        processes.barrier("workdir claimed")
        yield


@contextlib.contextmanager
def _claimed(config: ConfigDict, path: Path) -> Iterator[None]:
    if config.data.dir and os.path.realpath(config.data.dir) == os.path.realpath(path):
        raise UserError(
            f"--workdir={path} is the data directory: the pictures that a run writes would become "
            "data; use another folder, which may be below it"
        )
    path.mkdir(parents=True, exist_ok=True)
    busy = f"another run is at work in {path}; use another --workdir"
    with files.lock(path / ".lock", busy=busy):
        stored = path / "config.json"
        if stored.exists():
            before = config_lib.load(str(stored))
            _require_checkpoints(before, config, str(path))
            changed = config_lib.differences(before, config, _sections_in_use(config, path))
            if changed:
                raise UserError(
                    f"{path} was made with another config ({'; '.join(changed)}). "
                    "Put the values back to go on, or use another --workdir"
                )
        checkpoint.claim(config, str(path))
        files.write_text(stored, config_lib.to_json(config) + "\n")
        yield


def _require_checkpoints(before: ConfigDict, config: ConfigDict, workdir: str) -> None:
    """Raises ``UserError`` if the run has checkpoints, but the config leads to none."""
    old, new = (checkpoint.folder(c, workdir) for c in (before, config))
    if old == new or checkpoint.exist(config, workdir) or not checkpoint.exist(before, workdir):
        return
    raise UserError(
        f"the checkpoints of {workdir} are in {old}, but config.training.checkpoints="
        f"{config.training.checkpoints!r} stands for {new}, which has none. Give the old folder "
        f"again ({before.training.checkpoints!r}), or copy its content to the new one"
    )


def _sections_in_use(config: ConfigDict, path: Path) -> tuple[str, ...]:
    """Beginnings of the config keys on which something in the workdir depends already."""
    if checkpoint.exist(config, str(path)):
        return ("",)
    if (path / "autoencoder").exists():
        crops = ("random_crop", "flip", "num_crops", "cache_text_features")
        return (
            *("seed", "data.name", "data.image_size", "autoencoder."),
            *(f"data.{field}" for field in crops if (path / "codes").exists()),
        )
    return ("-",)
