"""TensorBoard's event files."""

import time
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog


class EventFile:
    """One more event file in ``folder``; what earlier ones tell of later steps is void.

    Everything is written at once, so that a full disk is an OSError where it happens.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes numbers, by names such as 'train/loss'."""
        for name, value in values.items():
            self._add(step, summary=summary.scalar(name, float(value)))
        self._events.flush()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a uint8 [H, W, 3] picture."""
        self._add(step, summary=summary.image(name, image, dataformats="HWC"))
        self._events.flush()

    def close(self) -> None:
        """Closes the file."""
        self._events.close()

    def _add(self, step: int, **content) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))
