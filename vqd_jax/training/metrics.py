"""Where numbers go: a progress bar, ``metrics.jsonl`` and TensorBoard event files."""

import json
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vqd_jax.parallel import processes


class MetricWriter:
    """Appends to ``workdir/metrics.jsonl`` (an object a line) and to ``workdir/tensorboard``.

    Of several processes, the first one writes. Lines of later steps than ``step`` are dropped
    first: the run that is continued from a checkpoint writes them anew. Everything is written at
    once, so that a full disk is an OSError where it happens.
    """

    def __init__(self, workdir: str, step: int):
        self._active = processes.is_writer()
        if not self._active:
            return
        self._path = Path(workdir) / "metrics.jsonl"
        if self._path.exists():
            _drop_after(self._path, step)
        # It imports PyTorch where there is one, whose memory sampling shall not pay for.
        from vqd_jax.training.event_file import EventFile

        self._events = EventFile(Path(workdir) / "tensorboard", step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes scalars, by names such as 'train/loss'."""
        if not self._active:
            return
        line = json.dumps({"step": step, **{k: float(v) for k, v in values.items()}})
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._events.scalars(step, values)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Shows a uint8 [H, W, 3] picture in TensorBoard."""
        if self._active:
            self._events.image(step, name, image)

    def close(self) -> None:
        """Closes the event file."""
        if self._active:
            self._events.close()


def _drop_after(path: Path, step: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            # A line that a kill cut short belongs to a step that is done again.
            continue
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(scratch, path)


def progress_bar(name: str, total: int, start: int = 0) -> tqdm:
    """A bar with rate and time left; a line every half minute where there is no terminal."""
    live = sys.stderr.isatty()
    return tqdm(
        disable=not processes.is_writer(),
        desc=name,
        total=total,
        initial=start,
        dynamic_ncols=live,
        mininterval=0.5 if live else 30,
        maxinterval=1 if live else 60,
        unit="step",
    )
