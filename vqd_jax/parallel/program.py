"""How much memory a program takes on a device, and what devices exchange, without running it.

A program is compiled from shapes alone, so that nothing is allocated. Its devices may be those of
this machine, virtual ones (``XLA_FLAGS=--xla_force_host_platform_device_count=8``), or a TPU slice
or GPUs that are not there. No other module reads the text of compiled programs (HLO).
"""

import collections
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from vqd_jax.errors import UserError
from vqd_jax.parallel import sharding

GIB = 2**30
# GiB of memory of one device, by the beginning of its kind. Of a GPU only three quarters count,
# because JAX takes no more.
HBM_GIB = {
    "TPU v4": 32,
    "TPU v5 lite": 16,
    "TPU v5": 95,
    "TPU v6 lite": 32,
    "NVIDIA H100": 59,
    "NVIDIA H200": 105,
    "NVIDIA A100": 59,
}

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
# Without the GPU, the compiler cannot try out which of several kernels is the fastest.
_UNTRIED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Bytes of one number, by its type in the text of a program.
BYTES = {
    **dict.fromkeys(("pred", "s8", "u8"), 1),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64"), 8),
}
_SHAPE = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_COLLECTIVE = re.compile(rf"^(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(
    r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_WHILE = re.compile(r"\bwhile\(.*condition=%?([\w.\-]+)")
_LIMIT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")
# Groups as axes of a mesh: the sizes of all axes, then the names of the axes of the exchange.
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")


class Memory(NamedTuple):
    """Bytes on one device. Outputs that reuse donated arguments count once, as arguments."""

    arguments: int
    temporaries: int
    outputs: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class Collective(NamedTuple):
    """One exchange between devices in a program.

    Attributes:
      kind: one of ``KINDS``.
      shapes: shapes of its results on one device.
      group: number of devices that take part in one exchange.
      times: number of exchanges in one run of the program.
      moved: bytes that one device receives in all of them, by the ring algorithms.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    group: int
    times: int
    moved: int


class Plan(NamedTuple):
    """What a train step takes, in bytes on one device.

    Attributes:
      parameters: (name, shape, spec, bytes) of every parameter.
      state: bytes of the train state by part ('params', 'ema_params', 'opt_state', ...).
      program: memory of the compiled step, the state included.
      traffic: kind of exchange -> (how many, bytes) in one step.
    """

    parameters: list[tuple[str, tuple[int, ...], str, int]]
    state: dict[str, int]
    program: Memory
    traffic: dict[str, tuple[int, int]]


def topology(name: str) -> Sequence[jax.Device]:
    """Devices that need not be there.

    Args:
      name: a TPU slice such as 'v5e:4x4', 'v5p:2x2x1' or 'v6e:1', which needs libtpu, or the GPUs
        of one machine, 'h100:1' to 'h100:8', which need jax with CUDA.

    Raises:
      UserError: the compiler for them is missing, or no devices have this name.
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
    # JAX would look for a driver, and there is none where there is no GPU.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    found = topologies.get_topology_desc(
        platform="cuda", target_config=_H100, topology=f"1x1x{count}"
    )
    return found.devices


def _tpus(kind: str, shape: str) -> Sequence[jax.Device]:
    # Without these, libtpu asks the network which machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # No chip is used, so several processes may compile at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = {}
    if shape == "1":
        dimensions = 3 if kind in ("v4", "v5p") else 2
        shape, options = "x".join("1" * dimensions), {"chips_per_host_bounds": (1, 1, 1)}
    found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **options)
    return found.devices


def compiled(lowered: jax.stages.Lowered, device: jax.Device) -> jax.stages.Compiled:
    """A program for devices like ``device``, which need not be there.

    Raises:
      UserError: it needs more memory than such a device has.
    """
    absent = device.platform == "gpu" and device not in jax.devices()
    try:
        return lowered.compile(compiler_options=_UNTRIED if absent else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).split("RESOURCE_EXHAUSTED:")[-1].strip()
        raise UserError(f"the program does not fit: {reason}") from error


def plan(state: Any, lowered: jax.stages.Lowered, mesh: Mesh) -> Plan:
    """Compiles a train step and reads off what it takes.

    Args:
      state: abstract train state, a dataclass with ``params``; every leaf has a sharding.
      lowered: the step.
      mesh: the devices that it is for.

    Raises:
      UserError: the step needs more memory than a device has.
    """
    step = compiled(lowered, mesh.devices.flat[0])
    parts = {name: getattr(state, name) for name in state.__dataclass_fields__}
    return Plan(
        parameters=[_row(path, x) for path, x in jax.tree_util.tree_leaves_with_path(state.params)],
        state={name: sum(map(_bytes, jax.tree.leaves(part))) for name, part in parts.items()},
        program=memory(step),
        traffic=by_kind(collectives(step.as_text())),
    )


def _row(path, x) -> tuple[str, tuple[int, ...], str, int]:
    spec = ", ".join(str(axis) for axis in x.sharding.spec) or "whole"
    return sharding.dotted(path), x.shape, spec, _bytes(x)


def _bytes(x: jax.ShapeDtypeStruct) -> int:
    size = 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
    return math.prod(x.sharding.shard_shape(x.shape)) * size


def describe(
    plan: Plan,
    mesh: Mesh,
    hbm_gib: float | None,
    training: str = "training",
    network: str = "denoiser",
) -> str:
    """The plan as text. Its last line says whether it fits.

    Args:
      plan: of a train step.
      mesh: the devices that it is for.
      hbm_gib: memory of one device, GiB; None is unknown.
      training: section of the config with the batch, for advice.
      network: section of the config with ``remat``, for advice.
    """
    lines = [f"{'parameter':58} {'shape':22} {'spec':22} {'MiB a device':>12}"]
    for name, shape, spec, size in plan.parameters:
        lines.append(f"{name:58} {'x'.join(map(str, shape)):22} {spec:22} {size / 2**20:12.3f}")
    count = sum(math.prod(shape) for _, shape, _, _ in plan.parameters)
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    parts = [f"{name} {size / GIB:.3f}" for name, size in plan.state.items() if size > 4096]
    lines += [
        "",
        f"{count / 1e6:.1f} M parameters on {mesh.size} devices ({sizes})",
        f"state, GiB a device: {', '.join(parts)}",
        f"step, GiB a device: state and batch {plan.program.arguments / GIB:.2f}, activations and "
        f"other temporaries {plan.program.temporaries / GIB:.2f}, outputs "
        f"{plan.program.outputs / GIB:.2f}; together {plan.program.total / GIB:.2f}",
    ]
    for kind, (number, size) in plan.traffic.items():
        lines.append(f"exchanged a step and device: {kind} {number} times, {size / 2**20:.1f} MiB")
    if hbm_gib is None:
        lines.append("the memory of such a device is not known: give --hbm_gib")
    elif plan.program.total <= hbm_gib * GIB:
        lines.append(f"fits into {hbm_gib:g} GiB")
    else:
        lines.append(
            f"DOES NOT FIT into {hbm_gib:g} GiB; raise config.mesh.fsdp or "
            f"config.{training}.gradient_accumulation, set config.{network}.remat=full, or lower "
            f"config.{training}.batch_size"
        )
    return "\n".join(lines)


def hbm_of(device: jax.Device) -> float | None:
    """GiB of memory of a device, if it or its kind is known."""
    stats = device.memory_stats() if device in jax.local_devices() else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] / GIB
    found = [size for kind, size in HBM_GIB.items() if device.device_kind.startswith(kind)]
    return float(found[0]) if found else None


def memory(compiled: Any) -> Memory:
    """What a compiled program holds on one device."""
    stats = compiled.memory_analysis()
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Memory(stats.argument_size_in_bytes, stats.temp_size_in_bytes, max(outputs, 0))


def collectives(hlo: str) -> list[Collective]:
    """The exchanges of a program, ``compiled.as_text()``; one in a loop counts in every turn."""
    bodies, entry = _computations(hlo)
    times = _times(bodies, entry)
    found = {}
    for name, lines in bodies.items():
        for number, line in enumerate(lines):
            match = _COLLECTIVE.match(line)
            if match and times[name]:
                # An exchange that overlaps with computations is written once for each of them. All
                # copies have one channel.
                channel = _CHANNEL.search(line)
                key = channel.group(1) if channel else (name, number)
                result, kind, start = match.groups()
                # The TPU compiler keeps a fused reduce-scatter as a computation of this name.
                scattered = kind == "all-reduce" and name.startswith("all-reduce-scatter")
                found[key] = _collective(line, result, kind, start, times[name], scattered)
    return [c for c in found.values() if c.group > 1 or c.kind == "collective-permute"]


def by_kind(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """kind -> (exchanges, bytes that one device receives) in one run of the program."""
    table = collections.Counter(), collections.Counter()
    for c in found:
        table[0][c.kind] += c.times
        table[1][c.kind] += c.moved
    return {kind: (table[0][kind], table[1][kind]) for kind in KINDS if table[0][kind]}


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    bodies, entry, current = {}, "", None
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header and not line.startswith(" "):
            current = bodies.setdefault(header.group(1), [])
            if line.startswith("ENTRY"):
                entry = header.group(1)
        elif current is not None:
            current.append(line.strip())
    return bodies, entry


def _called(line: str, bodies: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    turns = 1
    if loop := _WHILE.search(line):
        # Loops over layers, chunks and steps count from 0 to a constant in their condition.
        limits = _LIMIT.findall("\n".join(bodies.get(loop.group(1), ())))
        turns = max(map(int, limits), default=1)
    for name in _CALLED.findall(line):
        yield name, turns
    for names in _BRANCHES.findall(line):
        for name in re.findall(r"[\w.\-]+", names):
            yield name, 1


def _times(bodies: dict[str, list[str]], entry: str) -> collections.Counter:
    """How often a run of the program runs every computation."""
    times = collections.Counter()

    def visit(name, count):
        times[name] += count
        for line in bodies.get(name, ()):
            for callee, turns in _called(line, bodies):
                visit(callee, count * turns)

    visit(entry, 1)
    return times


def _group(line: str) -> int:
    """How many devices take part in one exchange."""
    if match := _MESH_GROUPS.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match.group(2)))
    if match := _GROUPS.search(line):
        listed, width = match.groups()
        return int(width) if width else len(listed.split(","))
    return 1


def arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every array in the text of a type, as 'f32[8,4]' or a tuple of such."""
    found = _SHAPE.findall(text)
    return [(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in found]


def size(text: str) -> int:
    """Bytes of a type."""
    return sum(BYTES[dtype] * math.prod(shape) for dtype, shape in arrays(text))


def _collective(line, result, kind, start, times, scattered) -> Collective:
    parts = arrays(result)
    if start and kind != "all-reduce":
        # (operands, results, contexts): the first half of the arrays are operands.
        parts = [part for part in parts if part[1]]
        parts = parts[len(parts) // 2 :]
    group = _group(line)
    whole = sum(BYTES[dtype] * math.prod(shape) for dtype, shape in parts)
    share = (group - 1) / group
    if scattered:
        # Its result is whole here: every device keeps its part.
        kind, moved = "reduce-scatter", whole * share
    else:
        moved = {
            "all-gather": whole * share,
            "all-reduce": 2 * whole * share,
            "reduce-scatter": whole * (group - 1),
            "all-to-all": whole * share,
            "collective-permute": whole,
        }[kind]
    return Collective(kind, tuple(s for _, s in parts), group, times, int(moved) * times)
