"""What the benchmarks take from the package is still there."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
# Loads the files without running them, as their commands would; all in one process, since most of
# the time is that of jax.
LOAD = """
import runpy, sys, traceback
paths = [sys.argv[1], *filter(None, sys.path)]
for script in sys.argv[2:]:
    # What another one has done must not help it to find the configs.
    sys.path[:] = paths
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        del sys.modules[name]
    try:
        runpy.run_path(script)
    except BaseException:
        traceback.print_exc()
        sys.exit(script)
"""


def load(scripts):
    command = [sys.executable, "-c", LOAD, str(ROOT / "benchmarks"), *map(str, scripts)]
    run = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr


def needs_torch(script):
    return "torch" in script.read_text(encoding="utf-8")


def test_benchmarks_can_be_loaded():
    load([script for script in SCRIPTS if not needs_torch(script)])


@pytest.mark.slow
def test_benchmarks_beside_pytorch_can_be_loaded():
    pytest.importorskip("torch", reason="the extra convert has what they compare with")
    load([script for script in SCRIPTS if needs_torch(script)])
