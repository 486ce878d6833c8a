"""Shared by all tests: one prepared data folder, and runs of the command line in processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Environment of child processes: their own data folder, and compiled programs kept."""
    return os.environ | {
        "TFDS_DATA_DIR": str(tmp_path_factory.mktemp("data_sets")),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }


@pytest.fixture(scope="session")
def start(environment):
    """start('--mode=sample', ...) -> a running ``python -m vqd_jax.main`` with those flags.

    ``devices`` is the number of CPU devices that it sees, ``env`` is added to its environment.
    """

    def start(*flags, devices=1, **kwargs):
        count = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        return subprocess.Popen(
            [sys.executable, "-m", "vqd_jax.main", *flags],
            cwd=kwargs.pop("cwd", ROOT),
            env=environment | (count if devices > 1 else {}) | kwargs.pop("env", {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **kwargs,
        )

    return start


@pytest.fixture(scope="session")
def run(start):
    """run(...) -> (exit status, output) of a finished ``python -m vqd_jax.main``."""

    def run(*flags, **kwargs):
        process = start(*flags, **kwargs)
        output, _ = process.communicate(timeout=600)
        return process.returncode, output

    return run


@pytest.fixture(scope="session")
def tiny_run(run, tmp_path_factory):
    """Workdir of a finished run of configs/tiny.py, never interrupted. Not to be changed."""
    folder = tmp_path_factory.mktemp("tiny")
    # A relative path, as most people give it.
    status, output = run(f"--config={ROOT}/configs/tiny.py", "--workdir=runs/tiny", cwd=folder)
    assert status == 0, output
    return folder / "runs" / "tiny"
