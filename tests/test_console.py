import pathlib
import subprocess
import sys

import jax

from vqd_jax.parallel import processes

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import logging
from absl import app
from vqd_jax import console, files
console.quiet()
def main(_):
    logging.getLogger("jax._src.xla_bridge").warning("no CUDA. Falling back to cpu.")
    logging.getLogger("jax._src.xla_bridge").info("a detail of a library")
    logging.getLogger().warning("Using custom data configuration: %s", 1)
    files.decode_text(b"caf\\xe9", "captions.txt")
app.run(main)
"""


def test_warnings_of_libraries_are_shown():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    shown = [line.split(" ", 1)[1] for line in done.stderr.splitlines()]
    assert shown == [
        "no CUDA. Falling back to cpu.",
        "captions.txt is not UTF-8; it is read as Windows' code page 1252",
    ]


def test_the_first_line_names_the_devices(caplog):
    with caplog.at_level("INFO"), processes.session(distributed=False):
        pass
    assert caplog.messages[:1] == [f"{jax.device_count()} x cpu"]
