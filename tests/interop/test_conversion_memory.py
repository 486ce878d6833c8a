"""How much memory ``--mode=convert`` takes, of a file that is mostly averages and optimizer state.

python -m pytest -m slow tests/interop/test_conversion_memory.py
"""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from vqd_jax.interop import torch_file
from vqd_jax.models import conditioned
from vqd_jax.models.denoiser import DenoiserConfig
from vqd_jax.models.text_encoder import TextEncoderConfig

sys.path.insert(0, str(Path(__file__).parent))
import released  # noqa: E402
from torch_writer import write  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG = conditioned.ConditionedDenoiserConfig(
    TextEncoderConfig(
        vocab_size=49408, context_length=77, width=64, num_layers=1, num_heads=1, normalize=True
    ),
    DenoiserConfig(
        num_codes=40, grid=(4, 4), num_steps=100, width=1024, num_layers=6, num_heads=16,
        text_width=64,
    ),
)  # fmt: skip
# The command line in a process that tells its peak at the end; without arguments, what the imports
# alone take. (Not getrusage, whose peak a process takes over from the one that started it.)
RUN = """
import atexit, pathlib, re, runpy, sys

def tell():
    status = pathlib.Path("/proc/self/status").read_text()
    print("peak", int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024)

atexit.register(tell)
if len(sys.argv) > 1:
    runpy.run_module("vqd_jax.main", run_name="__main__", alter_sys=True)
else:
    import vqd_jax.main, vqd_jax.interop.convert
"""


def peak(*flags):
    """Bytes that a process with these flags of the command line took at most."""
    run = subprocess.run(
        [sys.executable, "-c", RUN, *flags],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], check=True,
    )  # fmt: skip
    return int(run.stdout.split()[-1])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A file of 1.9 GB; 0.47 GB of it are wanted."""
    abstract = jax.eval_shape(lambda: conditioned.init_params(CONFIG, jax.random.key(0)))
    params = released.fill(abstract, lambda shape: np.full(shape, 0.01, np.float32))
    codec = torch_file.load(GOLDEN / "patch_vqgan.pth")["model"]
    codec = released.codec_names({name: np.asarray(array) for name, array in codec.items()})
    text = {f"condition_emb.{n}": x for n, x in released.text_names(params["text_encoder"]).items()}
    denoiser = {
        f"transformer.{name}": array
        for name, array in released.denoiser_names(CONFIG.denoiser, params["denoiser"]).items()
    }
    diffusion = released.schedule_names(100) | text | denoiser
    path = tmp_path_factory.mktemp("released") / "last.pth"
    write(path, released.checkpoint(codec, diffusion, denoiser, moments=True))
    yield path
    path.unlink()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_converting_takes_at_most_half_more_than_the_wanted_weights(source, dtype, tmp_path):
    target = tmp_path / "model"
    taken = peak("--mode=convert", f"--source={source}", f"--target={target}", f"--dtype={dtype}")
    taken -= peak()
    size = (target / "model.safetensors").stat().st_size
    # Weights are wanted in float32, whatever they are stored in.
    wanted = size * (2 if dtype == "bfloat16" else 1)
    print(
        f"{dtype}: file {source.stat().st_size / 2**20:.0f} MiB, wanted {wanted / 2**20:.0f} MiB, "
        f"peak {taken / 2**20:.0f} MiB above the imports: {taken / wanted:.2f} times"
    )
    assert source.stat().st_size > 3.9 * wanted
    assert 0.9 < taken / wanted < 1.5
