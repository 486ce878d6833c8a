"""Where every array lives: the mesh, and the rules from parameter paths to its axes.

The mesh has three axes. ``data`` and ``fsdp`` both split the batch; ``fsdp`` also splits the
parameters, their averages and the optimizer's moments, which are gathered a layer at a time where
they are used; ``tensor`` splits the heads and the hidden units of one layer. With all three at 1
the same program runs on one device.

Letters: B batch.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vqd_jax.errors import UserError
from vqd_jax.models.attention import Placement, compute_capability

AXES = ("data", "fsdp", "tensor")
# The axes that the rows of a batch are spread over.
BATCH_AXES = ("data", "fsdp")

# Leaves of so many elements must be named by a rule; smaller ones (biases, norms) are replicated.
LARGE = 2**20

# A spec belongs to the last axes of an array, so that one rule serves a layer, a stack of layers
# and a convolution. The first rule that matches counts. A path is that of a parameter, such as
# 'denoiser.blocks.mlp_in.kernel', wherever it ends: averages and moments follow.
RULES = (
    (r"\.(query|key|value|mlp_in)\.kernel$", PartitionSpec("fsdp", "tensor")),
    (r"\.(query|key|value|mlp_in)\.bias$", PartitionSpec("tensor")),
    (r"\.(proj|mlp_out)\.kernel$", PartitionSpec("tensor", "fsdp")),
    # The modulations are needed whole beside a stream that is whole in its width.
    (r"\.linear\.kernel$", PartitionSpec("fsdp", None)),
    # The number of codes (2887) has no useful divisor.
    (r"\.to_logits\.kernel$", PartitionSpec("fsdp", None)),
    # What is read off a table divided by width is divided by width, and the layer after it would
    # exchange rows instead of its kernel.
    (r"\.norm_\w+\.embedding\.embedding$", PartitionSpec()),
    (r"embedding$", PartitionSpec("fsdp")),
)


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of ``config.mesh`` over all devices of all processes.

    Args:
      config: ``data``, ``fsdp`` and ``tensor`` of ``config.mesh`` are sizes; one may be -1, which
        is what the others leave.
      devices: use these instead, such as those of a topology that is not there.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def mesh_shape(config: ConfigDict, num_devices: int) -> tuple[int, int, int]:
    """(data, fsdp, tensor) for a number of devices; see ``make_mesh``."""
    sizes = [config.mesh[axis] for axis in AXES]
    given = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or num_devices % known or (-1 not in sizes and known != num_devices):
        raise UserError(
            f"config.mesh is {given}, but there are {num_devices} devices: the sizes must multiply "
            "to the number of devices; give -1 to one of them, which is then what the others leave"
        )
    return tuple(num_devices // known if size == -1 else size for size in sizes)


def num_row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def require_divisible(key: str, batch_size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Raises ``UserError`` unless every device gets the same number of rows of every batch.

    Args:
      key: of the config, which is named.
      batch_size: rows of a batch of all processes.
      mesh: what they are spread over.
      accumulation: parts that a batch is worked through in.
    """
    shards = num_row_shards(mesh)
    if batch_size % (shards * accumulation):
        parts = f"{mesh.shape['data']} x {mesh.shape['fsdp']} devices of data and fsdp"
        if accumulation > 1:
            parts += f" times config.training.gradient_accumulation={accumulation}"
        raise UserError(
            f"config.{key}={batch_size} cannot be divided over {parts}; make it a "
            f"multiple of {shards * accumulation}"
        )
    processes = jax.process_count()
    if processes > 1 and len(local_rows(mesh, batch_size)) * processes != batch_size:
        raise UserError(
            f"config.mesh.tensor={mesh.shape['tensor']} spans processes, of which each has "
            f"{jax.local_device_count()} devices; choose a divisor of that"
        )


def dotted(path: tuple) -> str:
    """'params.denoiser.to_logits.kernel' of a tree path."""
    return ".".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Rows spread over ``data`` and ``fsdp``; ``leading`` axes come before that of the rows."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, BATCH_AXES))


@functools.lru_cache(maxsize=8)
def placement(mesh: Mesh) -> Placement:
    """What a model needs to know of a mesh: activations [B, ...] are divided by rows, and by heads.

    An array with too few rows for all devices (as the times of a sampler) is left to the
    partitioner.
    """
    shards = num_row_shards(mesh)

    def constrain(x, heads_axis):
        if x.shape[0] % shards:
            return x
        spec = [BATCH_AXES, *[None] * heads_axis]
        if heads_axis and not x.shape[heads_axis] % mesh.shape["tensor"]:
            spec[heads_axis] = "tensor"
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return Placement(constrain, compute_capability(mesh.devices.flat[0]))


def shardings(abstract: Any, mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec]] = RULES) -> Any:
    """A ``NamedSharding`` for every leaf of a state.

    Args:
      abstract: pytree of ``jax.ShapeDtypeStruct``, such as an abstract ``TrainState``.
      mesh: has the axes that the rules name.
      rules: ordered pairs of a regular expression, searched in dotted paths, and a spec of the last
        axes.

    Raises:
      UserError: an array cannot be divided as its rule says; the message names it.
      ValueError: a large leaf matches no rule, or a rule matches nothing: the model has changed and
        the rules have not.
    """
    unused, unmatched = {pattern for pattern, _ in rules}, []

    def leaf(path, x):
        name = dotted(path)
        for pattern, spec in rules:
            if re.search(pattern, name):
                unused.discard(pattern)
                return NamedSharding(mesh, _aligned(name, x.shape, spec, mesh))
        if math.prod(x.shape) >= LARGE:
            unmatched.append(f"{name} {x.shape}")
        return replicated(mesh)

    result = jax.tree_util.tree_map_with_path(leaf, abstract)
    if unmatched:
        raise ValueError(f"no sharding rule for {'; '.join(unmatched)}: add one to RULES")
    if unused:
        raise ValueError(f"sharding rules that match no parameter: {', '.join(sorted(unused))}")
    return result


def _aligned(name, shape, spec, mesh) -> PartitionSpec:
    full = (None,) * (len(shape) - len(spec)) + tuple(spec)
    for axis, size in zip(full, shape, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"{name} of shape {shape}: {size} cannot be divided by "
                f"config.mesh.{axis}={mesh.shape[axis]}; choose a divisor of {size}"
            )
    return PartitionSpec(*full)


def with_shardings(abstract: Any, placed: Any) -> Any:
    """The abstract leaves with these shardings: what a checkpoint is restored into.

    Args:
      abstract: pytree of ``jax.ShapeDtypeStruct``.
      placed: shardings of its leaves, or of whole branches of it.
    """

    def branch(sharding, leaves):
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        return jax.tree.map(place, leaves)

    return jax.tree.map(branch, placed, abstract)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch the devices of this process hold: int64, increasing.

    Processes that share a ``tensor`` group hold the same rows.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in indices.values()]))


def put_batch(batch: Any, mesh: Mesh, leading: int = 0) -> Any:
    """Arrays on the mesh from this process's part of them.

    Args:
      batch: pytree of NumPy arrays whose rows are ``local_rows``.
      mesh: where to.
      leading: axes before that of the rows.
    """
    placed = batch_sharding(mesh, leading)
    # The one transfer of a step, and meant, where a guard looks for others.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(placed, x), batch)


def put_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays on the mesh from host arrays that every process has whole, [B, ...] each.

    The rows are spread over the devices where their number allows it.
    """

    def put(x):
        placed = replicated(mesh) if x.shape[0] % num_row_shards(mesh) else batch_sharding(mesh)
        return jax.make_array_from_callback(x.shape, placed, lambda index: x[index])

    return jax.tree.map(put, tree)


def fetch(tree: Any, mesh: Mesh) -> Any:
    """NumPy arrays, whole, on every process; the whole of each must fit on one device."""
    gather = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))
    return jax.tree.map(np.asarray, gather(tree))
