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


# A warning of TFDS at every start with a folder of one's own; it warns of nothing.
_SAID_IN_VAIN = ("Using custom data configuration",)


def quiet() -> None:
    """Shows the log messages of this package and the warnings of all others, beside bars."""
    package = Path(__file__).parent

    def is_shown(record):
        if Path(record.pathname).is_relative_to(package):
            return True
        in_vain = str(record.msg).startswith(_SAID_IN_VAIN)
        return record.levelno >= python_logging.WARNING and not in_vain

    logging.set_verbosity(logging.INFO)
    # TensorStore's threads write hundreds of lines about a damaged checkpoint, after its own error.
    sys.unraisablehook = lambda found: logging.debug("in a thread: %s", found.exc_value)
    handler = logging.get_absl_handler()
    handler.python_handler.setStream(_BesideBars())
    handler.addFilter(is_shown)
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
