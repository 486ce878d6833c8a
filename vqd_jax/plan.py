"""What a training run takes of every device, found out without allocating it.

The model is never made: its shapes are enough for the table of parameters, and the compiled program
tells the rest. The devices may be those of this machine, virtual ones
(``XLA_FLAGS=--xla_force_host_platform_device_count=8``), or a TPU slice or GPUs that are not there.
"""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
from absl import logging
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqd_jax.errors import UserError
from vqd_jax.parallel import program, sharding
from vqd_jax.training import state as state_lib

GIB = 2**30
# High-bandwidth memory of one device, GiB, by the beginning of its kind; of a GPU the three
# quarters that JAX takes.
HBM_GIB = {
    "TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32,
    "NVIDIA H100": 59, "NVIDIA H200": 105, "NVIDIA A100": 59,
}  # fmt: skip


# An H100 SXM for XLA's compiler, from NVIDIA's published sizes.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 85520809984 memory_bandwidth: 3352000000000 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 15 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Which kernel of several is the fastest cannot be tried out where there is no GPU.
_UNTRIED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


class Plan(NamedTuple):
    """Bytes on one device.

    Attributes:
      parameters: (name, shape, spec, bytes on one device) of every parameter.
      state: of the train state by part ('params', 'ema_params', 'opt_state', ...).
      program: of the compiled train step, which holds the state too.
      traffic: kind of exchange -> (how many, bytes) of a step.
    """

    parameters: list[tuple[str, tuple[int, ...], str, int]]
    state: dict[str, int]
    program: program.Memory
    traffic: dict[str, tuple[int, int]]


def topology(name: str) -> Sequence[jax.Device]:
    """Devices that need not be there.

    Args:
      name: a TPU slice such as 'v5e:4x4', 'v5p:2x2x1' or 'v6e:1', which needs libtpu, or the GPUs
        of one machine, 'h100:1' or 'h100:8', which need jax with CUDA.

    Raises:
      UserError: the compiler for them is missing, or there are none of this name.
    """
    kind, _, shape = name.partition(":")
    try:
        if kind != "h100":
            return _tpus(kind, shape)
        if shape not in map(str, range(1, 9)):
            raise ValueError("a machine has 1 to 8 of them")
        return _gpus(int(shape))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--topology={name}: {reason} (the compilers come with pip install 'vqd_jax[tpu]' or "
            "'vqd_jax[gpu]'; names are such as v5e:1, v5e:4x4, v5p:2x2x1, v6e:8x8, h100:8)"
        ) from error


def _gpus(count: int) -> Sequence[jax.Device]:
    # It looks for a driver, of which there is none where there is no GPU.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    found = topologies.get_topology_desc(
        platform="cuda", target_config=_H100, topology=f"1x1x{count}"
    )
    return found.devices


def _tpus(kind: str, shape: str) -> Sequence[jax.Device]:
    # Else libtpu asks the network which machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Several may compile at once where no chip is to be shared.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = {}
    if shape == "1":
        dimensions = 3 if kind in ("v4", "v5p") else 2
        shape, options = "x".join("1" * dimensions), {"chips_per_host_bounds": (1, 1, 1)}
    found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **options)
    return found.devices


def compiled(lowered: jax.stages.Lowered, device: jax.Device) -> jax.stages.Compiled:
    """A program for ``device`` and others like it, which need not be there."""
    absent = device.platform == "gpu" and device not in jax.devices()
    return lowered.compile(compiler_options=_UNTRIED if absent else None)


def make(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Plan:
    """Plans the training of ``config``; compiles its step.

    Args:
      config: the resolved config.
      devices: None is all devices of this machine.

    Raises:
      UserError: the mesh or the batch does not fit the devices.
    """
    mesh = sharding.make_mesh(config, devices)
    c = config.training
    sharding.require_divisible("training.batch_size", c.batch_size, mesh, c.gradient_accumulation)
    state = state_lib.abstract_state(config, mesh)
    step = compiled(state_lib.lower_train_step(config, mesh), mesh.devices.flat[0])
    parts = {name: getattr(state, name) for name in state.__dataclass_fields__}
    return Plan(
        parameters=[_row(path, x) for path, x in jax.tree_util.tree_leaves_with_path(state.params)],
        state={name: sum(map(_bytes, jax.tree.leaves(part))) for name, part in parts.items()},
        program=program.memory(step),
        traffic=program.by_kind(program.collectives(step.as_text())),
    )


def _row(path, x) -> tuple[str, tuple[int, ...], str, int]:
    spec = ", ".join(str(axis) for axis in x.sharding.spec) or "whole"
    return sharding.dotted(path), x.shape, spec, _bytes(x)


def _bytes(x: jax.ShapeDtypeStruct) -> int:
    size = 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
    return math.prod(x.sharding.shard_shape(x.shape)) * size


def describe(plan: Plan, mesh: Mesh, hbm_gib: float | None) -> str:
    """The plan as text, ending in whether it fits into ``hbm_gib`` a device (None: unknown)."""
    lines = [f"{'parameter':58} {'shape':22} {'spec':22} {'MiB a device':>12}"]
    for name, shape, spec, size in plan.parameters:
        lines.append(f"{name:58} {'x'.join(map(str, shape)):22} {spec:22} {size / 2**20:12.3f}")
    count = sum(math.prod(shape) for _, shape, _, _ in plan.parameters)
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines += [
        "",
        f"{count / 1e6:.1f} M parameters on {mesh.size} devices ({sizes})",
        "state, GiB a device: "
        + ", ".join(f"{name} {size / GIB:.3f}" for name, size in plan.state.items() if size > 4096),
        f"step, GiB a device: state and batch {plan.program.arguments / GIB:.2f}, activations and "
        f"other temporaries {plan.program.temporaries / GIB:.2f}, outputs "
        f"{plan.program.outputs / GIB:.2f}; together {plan.program.total / GIB:.2f}",
    ]
    for kind, (number, size) in plan.traffic.items():
        lines.append(f"exchanged a step and device: {kind} {number} times, {size / 2**20:.1f} MiB")
    if hbm_gib is None:
        lines.append("how much memory such a device has is not known: give --hbm_gib")
    else:
        fits = plan.program.total <= hbm_gib * GIB
        lines.append(
            f"{'fits' if fits else 'DOES NOT FIT'} into {hbm_gib:g} GiB"
            + ("" if fits else "; raise config.mesh.fsdp or config.training.gradient_accumulation, "
               "set config.denoiser.remat=full, or lower config.training.batch_size")
        )  # fmt: skip
    return "\n".join(lines)


def hbm_of(device: jax.Device) -> float | None:
    """GiB of memory of a device, if it or its kind is known."""
    stats = device.memory_stats() if _is_here(device) else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] / GIB
    found = [size for kind, size in HBM_GIB.items() if device.device_kind.startswith(kind)]
    return float(found[0]) if found else None


def _is_here(device: jax.Device) -> bool:
    return device in jax.local_devices()


def run(config: ConfigDict, topology_name: str | None = None, hbm_gib: float | None = None) -> None:
    """Prints the plan of ``config``; the task of ``--mode=plan``.

    Args:
      config: the resolved config.
      topology_name: devices to plan for (see ``topology``); None is those of this machine.
      hbm_gib: memory of a device; None is what is known of its kind.

    Raises:
      UserError: the mesh or the batch does not fit the devices, or no compiler for them is there.
    """
    devices = jax.devices() if topology_name is None else topology(topology_name)
    logging.info("compiling the train step for %d x %s", len(devices), devices[0].device_kind)
    try:
        made = make(config, devices)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "the train step does not fit: " + str(error).split("RESOURCE_EXHAUSTED:")[-1].strip()
        ) from error
    hbm = hbm_of(devices[0]) if hbm_gib is None else hbm_gib
    print(describe(made, sharding.make_mesh(config, devices), hbm))
