"""What an import of the package costs: the modules that it loads, in a process of its own."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import vqd_jax

ROOT = Path(__file__).resolve().parents[1]
# Only training, and the checkpoints of a run, need these.
HEAVY = {"orbax", "grain", "tensorflow_datasets", "tensorflow", "scipy", "tensorboardX"}


def loaded_by(*arguments):
    """First parts of the names of all modules that a Python with these arguments loads."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def test_the_pipeline_costs_neither_orbax_nor_grain_nor_tfds():
    loaded = loaded_by("-c", "from vqd_jax import VQDiffusion; VQDiffusion.generate")
    assert "flax" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("arguments", [("-m", "vqd_jax.main", "--help"), ("-c", "import vqd_jax")])
def test_what_needs_no_jax_loads_none(arguments):
    loaded = loaded_by(*arguments)
    assert "vqd_jax" in loaded
    assert not loaded & ({"jax", "flax", "numpy"} | HEAVY)


def test_names_of_the_package():
    assert vqd_jax.__version__ == metadata.version("vqd_jax")
    with pytest.raises(AttributeError, match="'vqd_jax' has no attribute 'VQGAN'"):
        vqd_jax.VQGAN  # noqa: B018
