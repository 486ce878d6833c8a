"""What a training run takes of every device, found out without allocating it.

The model is never made: its shapes are enough for the table of parameters, and the compiled program
tells the rest. The devices may be those of this machine, virtual ones
(``XLA_FLAGS=--xla_force_host_platform_device_count=8``), or a TPU slice that is not there.
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
from vqd_jax.training import program, sharding
from vqd_jax.training import state as state_lib

GIB = 2**30
# High-bandwidth memory of one device, GiB, by the beginning of its kind.
HBM_GIB = {
    "TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32,
    "NVIDIA H100": 80, "NVIDIA H200": 141, "NVIDIA A100": 80,
}  # fmt: skip


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
    """The devices of a TPU slice such as 'v5e:4x4', 'v5p:2x2x1' or 'v6e:1'; needs libtpu, no TPU.

    Raises:
      UserError: libtpu is missing, or knows no such slice.
    """
    # Else libtpu asks the network which machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Several may compile at once where no chip is to be shared.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    kind, _, shape = name.partition(":")
    options = {}
    if shape == "1":
        dimensions = 3 if kind in ("v4", "v5p") else 2
        shape, options = "x".join("1" * dimensions), {"chips_per_host_bounds": (1, 1, 1)}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{shape}", **options
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology={name}: {reason} (install libtpu with pip install 'vqd_jax[tpu]'; names "
            "are such as v5e:1, v5e:4x4, v5e:16x16, v5p:2x2x1, v6e:8x8)"
        ) from error
    return found.devices


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
    compiled = state_lib.lower_train_step(config, mesh).compile()
    parts = {name: getattr(state, name) for name in state.__dataclass_fields__}
    return Plan(
        parameters=[_row(path, x) for path, x in jax.tree_util.tree_leaves_with_path(state.params)],
        state={name: sum(map(_bytes, jax.tree.leaves(part))) for name, part in parts.items()},
        program=program.memory(compiled),
        traffic=program.by_kind(program.collectives(compiled.as_text())),
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
    stats = device.memory_stats() if device.platform != "tpu" or _is_here(device) else None
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
      topology_name: a TPU slice to plan for; None is the devices of this machine.
      hbm_gib: memory of a device; None is what is known of its kind.

    Raises:
      UserError: the mesh or the batch does not fit the devices, or libtpu is missing.
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
