"""What a user sees of the program: messages beside progress bars, errors without tracebacks."""

import io
import logging as python_logging
import sys
from pathlib import Path
from typing import NoReturn

from absl import logging
from tqdm import tqdm


def fail(message: str) -> NoReturn:
    """Ends the program with one line that begins with "error:"."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)


class _BesideBars(io.TextIOBase):
    """A stream to stderr that leaves progress bars whole."""

    def write(self, text):
        tqdm.write(text, file=sys.stderr, end="")

    def flush(self):
        sys.stderr.flush()


def quiet() -> None:
    """Shows the log messages of this package alone, beside progress bars.

    A failure inside a library reaches the user as an error.
    """
    package = Path(__file__).parent

    def is_ours(record):
        return Path(record.pathname).is_relative_to(package)

    logging.set_verbosity(logging.INFO)
    # TensorStore's threads write hundreds of lines about a damaged checkpoint, after its own error.
    sys.unraisablehook = lambda found: logging.debug("in a thread: %s", found.exc_value)
    handler = logging.get_absl_handler()
    handler.python_handler.setStream(_BesideBars())
    handler.addFilter(is_ours)
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
