"""How much memory reading takes, of a file that is mostly optimizer state."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from torch_writer import tensor, write  # noqa: E402

LAYERS, SIZE = 16, 1024
READ = """
import pathlib, re, sys
import jax, numpy as np
from vqd_jax.interop import tables, torch_file

def peak():
    # Not getrusage, whose peak a process takes over from the one that started it.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024

abstract = {"w": jax.ShapeDtypeStruct((%d, %d, %d), np.float32)}
before = peak()
loaded = torch_file.load(sys.argv[1])
rows = [tables.Row("w", "{i}.weight", "linear")]
params, _ = tables.read(rows, loaded["model"], abstract, "file")
print((peak() - before) / params["w"].nbytes, float(params["w"][-1, 0, 1]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_reading_takes_less_than_half_more_than_the_weights(tmp_path):
    layer = np.arange(SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    content = {
        part: {f"{i}.weight": tensor("FloatStorage", layer, f"{part}{i}") for i in range(LAYERS)}
        for part in ("model", "first_moment", "second_moment")
    }
    write(tmp_path / "last.pth", content)
    assert (tmp_path / "last.pth").stat().st_size > 3 * LAYERS * layer.nbytes
    script = READ % (LAYERS, SIZE, SIZE)
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "last.pth")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    ratio, value = map(float, run.stdout.split())
    assert value == SIZE
    assert 0.9 < ratio < 1.5
