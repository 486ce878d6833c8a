"""What the benchmarks take from the package is still there."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
# Loads the file without running it, as its command would.
LOAD = "import runpy, sys; sys.path.insert(0, sys.argv[2]); runpy.run_path(sys.argv[1])"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_can_be_loaded(script):
    if "torch" in script.read_text(encoding="utf-8"):
        # What is compared with PyTorch needs it; it comes with the extra "convert".
        pytest.importorskip("torch")
    command = [sys.executable, "-c", LOAD, str(script), str(script.parent)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
