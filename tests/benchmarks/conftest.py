"""The scripts of benchmarks/ as modules."""

import importlib
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def benchmark():
    """benchmark("scenes") -> the module of benchmarks/scenes.py."""
    folder = str(Path(__file__).resolve().parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)
