"""Compiled for chips that are not there: the published size B on a slice of sixteen."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs import tiny
from vqd_jax.parallel import sharding

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install -e '.[tpu]'",
)
def test_b_on_sixteen_chips_fits_and_exchanges_parameters_only(tmp_path):
    path = tmp_path / "result.json"
    done = subprocess.run(
        [
            sys.executable, ROOT / "benchmarks" / "tpu_compile.py",
            f"--config={ROOT}/configs/coco.py", "--topology=v5e:4x4", "--fsdp=16", "--rows=8",
            f"--json={path}",
        ],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(path.read_text())
    assert result["chips"] == 16
    assert result["gathered_activations"] == []
    gib = 2**30
    # Four copies of 389 M parameters and two of 63 M, four bytes each, over sixteen chips; the
    # tables of times (3.9 M parameters) are whole on every chip.
    assert result["arguments"] / gib == pytest.approx(0.46, abs=0.03)
    assert 1.0 < result["temporaries"] / gib < 3.5
    moved = sum(moved for _, moved in result["exchanged"].values())
    # Parameters are gathered twice, and their gradients once exchanged, in two to four bytes.
    assert 0.8 * gib < moved < 2.5 * gib


def test_the_sampler_is_lowered_for_a_mesh():
    script = runpy.run_path(str(ROOT / "benchmarks" / "tpu_compile.py"))
    config = tiny.get_config()
    lowered = script["lower_sampler"](config, sharding.make_mesh(config), 2)
    (codes,) = jax.tree.leaves(lowered.out_info)
    assert codes.shape == (2, 16)
