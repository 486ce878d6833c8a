"""Where numbers go: a progress bar, ``metrics.jsonl`` and TensorBoard event files."""

import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vqd_jax import files
from vqd_jax.parallel import processes


class MetricWriter:
    """Appends to ``workdir/metrics.jsonl`` (an object a line) and to ``workdir/tensorboard``.

    Among several processes, the first one writes. A run that is continued writes the steps after
    its checkpoint anew: their old lines move to ``metrics.replaced.jsonl``, and TensorBoard is told
    to forget their points.
    """

    def __init__(self, workdir: str, step: int):
        self._active = processes.is_writer()
        if not self._active:
            return
        self._path = Path(workdir) / "metrics.jsonl"
        if self._path.exists():
            _put_aside(self._path, step)
        self._events = _summary_writer()(
            str(Path(workdir) / "tensorboard"),
            purge_step=step + 1,
            # Any number may wait: on a full disk the thread that writes them has ended, and the run
            # must get to the error of its own file instead of waiting for that thread.
            max_queue=0,
            flush_secs=10,
            # Names hold whole seconds only.
            filename_suffix=f".{step}",
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes scalars, by names such as 'train/loss'.

        Raises:
          OSError: metrics.jsonl cannot be written.
        """
        if not self._active:
            return
        line = json.dumps({"step": step, **{k: float(v) for k, v in values.items()}})
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, float(value), step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Shows a uint8 [H, W, 3] picture in TensorBoard."""
        if self._active:
            self._events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Closes the event file."""
        if self._active:
            self._events.close()


def _summary_writer() -> type:
    """tensorboardX's writer of events; sampling does not need it.

    tensorboardX imports PyTorch where there is one, for the names of its types only. That takes
    seconds and memory at the start of every run, and is left out.
    """
    spared = "torch" not in sys.modules
    if spared:
        sys.modules["torch"] = None  # ``import torch`` is an ImportError now.
    try:
        from tensorboardX import SummaryWriter
    finally:
        if spared:
            del sys.modules["torch"]
    return SummaryWriter


def _put_aside(path: Path, step: int) -> None:
    """Moves the lines of later steps than ``step`` to another file."""
    kept, later = [], []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            (kept if json.loads(line)["step"] <= step else later).append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            # A line that a kill cut short belongs to a step that is done again.
            continue
    if later:
        with open(path.with_suffix(".replaced.jsonl"), "a", encoding="utf-8") as file:
            file.writelines(later)
    files.write_text(path, "".join(kept))


def progress_bar(name: str, total: int, start: int = 0, unit: str = "step") -> tqdm:
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
        unit=unit,
    )
