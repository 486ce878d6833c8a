"""The same codes on one device and on eight; a process fixes their number when it starts."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from vqd_jax.diffusion import rules, sampler, schedule

B, N, K, T = 8, 16, 7, 10
table = jax.random.normal(jax.random.key(1), (T + 1, N, K))
embedding = jax.random.normal(jax.random.key(2), (K + 1, K))
predict = lambda tokens, t: 2 * table[t] + embedding[tokens]
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
keys = jax.random.split(jax.random.key(0), B)
keys = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("data")))
codes = {}
for rule in (rules.Ancestral(), rules.Purity(), rules.Halton((4, 4)), rules.Remask()):
    settings = sampler.Settings(num_steps=6, truncation=jnp.float32(0.9), rule=rule)
    run = jax.jit(lambda keys, s: sampler.sample(keys, predict, (B, N), schedule.released(T, K), s))
    made = run(keys, settings).codes
    codes[type(rule).__name__] = made.tolist()
print(json.dumps({"devices": jax.device_count(), "codes": codes}))
"""


def run(num_devices):
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def one_device():
    return run(1)


@pytest.mark.slow
def test_codes_do_not_depend_on_the_number_of_devices(one_device):
    eight = run(8)
    assert (one_device["devices"], eight["devices"]) == (1, 8)
    assert eight["codes"] == one_device["codes"]
    for codes in eight["codes"].values():
        assert len({tuple(image) for image in codes}) == 8
