import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from configs import coco, imagenet, tiny
from vqd_jax.errors import UserError
from vqd_jax.parallel import sharding
from vqd_jax.training import stage_two, task

jax.config.update("jax_numpy_rank_promotion", "raise")


def mesh(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def places(config, mesh):
    abstract = task.abstract_state(stage_two.DenoiserTask(config), mesh)
    return jax.tree.map(lambda x: x.sharding, abstract)


def config(data=-1, fsdp=1, tensor=1):
    config = tiny.get_config()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = data, fsdp, tensor
    return config


@pytest.mark.parametrize(
    "sizes, devices, expected",
    [
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((2, -1, 2), 8, (2, 2, 2)),
        ((1, 4, 2), 8, (1, 4, 2)),
        ((-1, 16, 1), 256, (16, 16, 1)),
    ],
)
def test_one_axis_takes_what_the_others_leave(sizes, devices, expected):
    assert sharding.mesh_shape(config(*sizes), devices) == expected


@pytest.mark.parametrize("sizes", [(-1, 3, 1), (2, 2, 1), (-1, -1, 1), (16, 1, 1)])
def test_sizes_that_do_not_multiply_are_named(sizes):
    given = ", ".join(f"{a}={n}" for a, n in zip(sharding.AXES, sizes, strict=True))
    with pytest.raises(UserError, match=f"config.mesh is {given}, but there are 8 devices"):
        sharding.mesh_shape(config(*sizes), 8)


@pytest.fixture(scope="module")
def specs():
    """Path -> spec of the whole train state of the COCO model, on 2 x 4 x 2 devices."""
    placed = places(coco.get_config(), mesh(2, 4, 2))
    return {
        sharding.dotted(path): x.spec for path, x in jax.tree_util.tree_leaves_with_path(placed)
    }


def test_kernels_are_divided_and_norms_are_whole(specs):
    blocks = "params.denoiser.blocks"
    assert specs[f"{blocks}.mlp_in.kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs[f"{blocks}.mlp_out.kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs[f"{blocks}.self_attention.query.bias"] == PartitionSpec(None, "tensor")
    assert specs[f"{blocks}.self_attention.proj.bias"] == PartitionSpec()
    assert specs[f"{blocks}.norm_mlp.scale"] == PartitionSpec()
    assert specs["params.denoiser.code_embedding.embedding"] == PartitionSpec(None, "fsdp")
    assert specs["step"] == specs["time_statistics.visits"] == PartitionSpec()


def test_averages_and_moments_lie_where_their_parameters_do(specs):
    require_places(specs, moments_of_kernels=2)


def test_muon_s_moments_lie_where_their_parameters_do():
    config = coco.get_config()
    config.training.optimizer = "muon"
    placed = places(config, mesh(2, 4, 2))
    leaves = jax.tree_util.tree_leaves_with_path(placed)
    require_places({sharding.dotted(path): x.spec for path, x in leaves}, moments_of_kernels=1)


def require_places(specs, moments_of_kernels):
    params = {path[7:]: spec for path, spec in specs.items() if path.startswith("params.")}
    assert len(params) > 50
    found = 0
    for path, spec in specs.items():
        for name, wanted in params.items():
            if path.startswith(("ema_params.", "opt_state.")) and path.endswith(f".{name}"):
                assert spec == wanted, path
                found += 1
    # A kernel of scanned layers has an axis more than its rule.
    kernels = [name for name in params if re.search(r"blocks\..*kernel$", name)]
    assert len(kernels) > 10
    assert found == 3 * len(params) - (2 - moments_of_kernels) * len(kernels)


def test_convolutions_and_class_tables_have_rules():
    placed = places(imagenet.get_config(), mesh(1, 4, 2))
    blocks = placed.params["denoiser"]["blocks"]
    kernel = blocks["mlp_in"]
    while "kernel" not in kernel:
        (kernel,) = kernel.values()
    assert kernel["kernel"].spec == PartitionSpec(None, None, None, "fsdp", "tensor")
    assert blocks["norm_mlp"]["embedding"]["embedding"].spec == PartitionSpec(None, None, None)


def test_a_size_that_cannot_be_divided_is_named():
    with pytest.raises(
        UserError, match=r"params\.\S+ of shape .*: 16 cannot .*config.mesh.fsdp=32"
    ):
        places(tiny.get_config(), mesh(1, 32, 1))


def test_a_large_leaf_without_a_rule_is_an_error():
    abstract = {"other": {"weights": jax.ShapeDtypeStruct((2048, 1024), jnp.float32)}}
    with pytest.raises(ValueError, match=r"no sharding rule for other.weights \(2048, 1024\)"):
        sharding.shardings(abstract, mesh(1, 2, 1), ())


def test_a_rule_that_matches_nothing_is_an_error():
    rules = ((r"kernel$", PartitionSpec("fsdp")), (r"gone$", PartitionSpec("fsdp")))
    abstract = {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}
    with pytest.raises(ValueError, match=r"match no parameter: gone\$"):
        sharding.shardings(abstract, mesh(1, 2, 1), rules)


def test_batches_must_be_divisible():
    real = sharding.make_mesh(config())
    sharding.require_divisible("training.batch_size", 6, real, 3)
    with pytest.raises(UserError, match="config.training.batch_size=6 .*gradient_accumulation=4"):
        sharding.require_divisible("training.batch_size", 6, real, 4)


ROOT = pathlib.Path(__file__).parents[2]
PUT = """
import json, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from vqd_jax.parallel import sharding
port, index = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
place = NamedSharding(jax.make_mesh((1, 2, 1), sharding.AXES), PartitionSpec("fsdp"))
old = jax.jit(lambda: jax.numpy.zeros((2, 3)), out_shardings=place)()
mine = np.full((2, 3), 10.0 * index, np.float32) + np.arange(2, dtype=np.float32)[:, None]
new = sharding.put_like({"w": old}, {"w": mine})["w"]
assert new.sharding == place
print(json.dumps(np.asarray(new.addressable_data(0)).tolist()))
"""


def test_every_process_puts_its_own_part_of_weights_and_asks_no_other():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PUT, str(port), str(index)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for index in range(2)
    ]  # fmt: skip
    found = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], found
    # Each has other values: whoever compared or gathered them would stop, or have them mixed.
    rows = [json.loads(out.splitlines()[-1]) for out, _ in found]
    assert rows == [[[0.0] * 3], [[11.0] * 3]]


def test_one_process_has_all_rows_and_gets_them_back():
    real = sharding.make_mesh(config())
    np.testing.assert_array_equal(sharding.local_rows(real, 6), np.arange(6))
    rows = np.arange(12, dtype=np.int32).reshape(6, 2)
    for put in (sharding.put_batch, sharding.put_rows):
        np.testing.assert_array_equal(sharding.fetch(put({"x": rows}, real))["x"], rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_slow_dtype_is_told_in_one_line(dtype, caplog):
    slow = config()
    slow.denoiser.dtype = dtype
    with caplog.at_level("WARNING"):
        sharding.warn_of_slow_dtype(slow, jax.devices("cpu")[0])
    messages = [r.getMessage() for r in caplog.records if "denoiser.dtype" in r.getMessage()]
    assert [m.split(":")[0] for m in messages] == (
        ["denoiser.dtype=bfloat16 is slow on a CPU"] if dtype == "bfloat16" else []
    )


def test_a_placement_divides_rows_and_heads():
    place = sharding.placement(sharding.make_mesh(config()))
    assert place.compute_capability == 0.0
    x = jnp.ones((2, 3, 4, 5))
    rows, heads = (
        jax.make_jaxpr(constrain)(x).eqns[0].params["sharding"].spec
        for constrain in (place.rows, place.heads)
    )
    assert rows == PartitionSpec(("data", "fsdp"))
    assert heads == PartitionSpec(("data", "fsdp"), None, "tensor")
