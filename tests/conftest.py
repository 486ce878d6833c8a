"""Shared by all tests: one prepared data folder, and runs of the command line in processes."""

import gc
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from vqd_jax import files

ROOT = Path(__file__).resolve().parents[1]

# Programs that one test process has compiled are there for the others, for their children and for
# the next run. JAX reads these when it is imported, which is after this file.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vqd_jax" / "tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
# Most tests compile more than they compute, and XLA compiles faster without its expensive passes.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests the programs that users run; .ci/run does so for
# one file of every room.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older way to make loops compiles faster. Later versions do not know the flag.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
    )

# JAX keeps many objects and leaves little garbage: to look for it as often as Python does takes
# time.
gc.freeze()
gc.set_threshold(200_000, 50, 50)

# Files that take longest begin first, so that no worker is left alone with one at the end. (Without
# ``--no-loadscope-reorder``, xdist begins with the files of most tests.) The first one makes
# ``tiny_run``; what is beside it must not wait for that.
_LONGEST = (
    "test_main.py", "test_bulk.py", "data/test_kills.py", "parallel/test_processes.py",
    "test_reliability.py", "test_mistakes.py", "web/test_page.py", "training/test_distil.py",
    "training/test_stage_two.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Moves the tests of the files that take longest to the front."""
    here = ROOT / "tests"

    def place(item):
        name = str(item.path.relative_to(here)) if item.path.is_relative_to(here) else ""
        return _LONGEST.index(name) if name in _LONGEST else len(_LONGEST)

    items.sort(key=place)


@pytest.fixture(scope="module", autouse=True)
def memory_maps():
    """Lets go of compiled programs before there are too many for a process.

    Linux allows 65,530 maps in a process, each program of XLA's takes several, and the one that
    gets none ends the process with a fault of segmentation.
    """
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Environment of child processes: their own data folder, and no accelerator."""
    return os.environ | {
        "TFDS_DATA_DIR": str(tmp_path_factory.mktemp("data_sets")),
        "JAX_PLATFORMS": "cpu",
    }


@pytest.fixture(scope="session")
def start(environment):
    """start('--mode=sample', ...) -> a running ``python -m vqd_jax.main`` with those flags.

    ``devices`` is the number of CPU devices that it sees, ``env`` is added to its environment.
    """

    def start(*flags, devices=1, **kwargs):
        xla = os.environ.get("XLA_FLAGS", "")
        count = {"XLA_FLAGS": f"{xla} --xla_force_host_platform_device_count={devices}"}
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


@pytest.fixture
def call(capfd, caplog, monkeypatch, environment):
    """call('--mode=sample', ...) -> (exit status, output) of the command line in this process."""
    from absl.testing import flagsaver

    from vqd_jax import main

    monkeypatch.setenv("TFDS_DATA_DIR", environment["TFDS_DATA_DIR"])
    monkeypatch.chdir(ROOT)

    def call(*flags):
        argv = ["main.py", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        caplog.clear()
        status, before = 0, flagsaver.save_flag_values()
        try:
            with caplog.at_level("INFO"):
                main.run(main.parse(argv))
        except SystemExit as end:
            status = end.code
        finally:
            # Flags of libraries that were imported meanwhile stay; those of the config must not.
            after = flagsaver.save_flag_values()
            libraries = {n: flag for n, flag in after.items() if not n.startswith("config.")}
            flagsaver.restore_flag_values(libraries | before)
        return status, caplog.text + "".join(capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def tiny_run(start, tmp_path_factory):
    """Workdir of a finished run of configs/tiny.py, never interrupted. Not to be changed."""
    folder = tmp_path_factory.getbasetemp()
    # One run serves all processes of a parallel session; the first one makes it.
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    made = folder / "runs" / "tiny" / "samples.png"
    with files.lock(folder / ".tiny.lock"):
        if not made.exists():
            # A relative path, as most people give it.
            flags = (f"--config={ROOT}/configs/tiny.py", "--workdir=runs/tiny")
            process = start(*flags, cwd=folder)
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output
    return made.parent


@pytest.fixture(scope="session")
def untrained():
    """untrained(config) -> a model with random weights."""
    # After the folder of compiled programs is set.
    import jax

    from vqd_jax import config as config_lib
    from vqd_jax.models import autoencoder, conditioned
    from vqd_jax.pipeline import VQDiffusion

    def untrained(config):
        @jax.jit
        def init():
            params = conditioned.init_params(config_lib.model_config(config), jax.random.key(0))
            codec = config_lib.autoencoder_config(config)
            # Large enough that the text and the guidance matter to an untrained network.
            return jax.tree.map(lambda x: 8 * x, params), autoencoder.init_params(
                codec, jax.random.key(1)
            )

        return VQDiffusion(config, *init())

    return untrained


@pytest.fixture(scope="session")
def tiny_model(untrained):
    """An untrained model of configs/tiny.py. Not to be changed."""
    from configs import tiny

    return untrained(tiny.get_config())


SERVER = ROOT / "tests" / "bucket_server.py"


class Bucket:
    """A bucket, called ``bucket``: its files, seen past the runs."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"
        # For Google's libraries to take it for theirs.
        self.env = {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            # Another service, which tells the kind of a bucket, is not there.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def names(self, prefix):
        query = urllib.parse.urlencode({"prefix": prefix})
        with urllib.request.urlopen(f"{self.url}/storage/v1/b/bucket/o?{query}") as answer:
            return [item["name"] for item in json.load(answer)["items"]]

    def steps(self, run):
        """Steps with a file, and those of them that are complete."""
        parts = [name.split("/") for name in self.names(run + "/")]
        begun = {int(part[1]) for part in parts if part[1].isdigit()}
        return begun, {s for s in begun if [run, str(s), "commit_success.txt"] in parts}

    def read(self, name):
        return urllib.request.urlopen(f"{self.url}/bucket/{urllib.parse.quote(name)}").read()

    def write(self, name, content):
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        url = f"{self.url}/upload/storage/v1/b/bucket/o?{query}"
        urllib.request.urlopen(urllib.request.Request(url, data=content)).close()

    def remove(self, prefix):
        for name in self.names(prefix):
            url = f"{self.url}/storage/v1/b/bucket/o/{urllib.parse.quote(name, safe='')}"
            urllib.request.urlopen(urllib.request.Request(url, method="DELETE")).close()

    def copy_to(self, run, folder):
        for name in self.names(run + "/"):
            target = folder / name.removeprefix(run + "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.read(name))


@pytest.fixture(scope="module")
def bucket():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, SERVER, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    bucket = Bucket(port)
    for _ in range(600):
        assert process.poll() is None
        try:
            bucket.names("")
            break
        except OSError:
            time.sleep(0.1)
    else:
        pytest.fail("the bucket's server does not answer")
    yield bucket
    process.kill()
    process.communicate()
