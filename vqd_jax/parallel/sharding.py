"""The place of every array: the mesh, and the rules from parameter paths to its axes.

The mesh has three axes. ``data`` and ``fsdp`` both split the batch. ``fsdp`` also splits the
parameters, their averages and the optimizer's moments; a layer's parameters are gathered where they
are used. ``tensor`` splits the heads and the hidden units of a layer. With all three at 1, the same
program runs on one device.

Letters: B batch.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vqd_jax.errors import UserError
from vqd_jax.models.attention import Placement, compute_capability

AXES = ("data", "fsdp", "tensor")
# The axes that the rows of a batch are spread over.
BATCH_AXES = ("data", "fsdp")

# A leaf of at least this many elements needs a rule. Smaller ones (biases, norms) are replicated.
LARGE = 2**20

# A spec divides the last axes of an array, so one rule serves a layer, a stack of layers and a
# convolution. The first rule that matches counts. Patterns match the end of paths such as
# 'denoiser.blocks.mlp_in.kernel'; the paths of averages and moments end in the same way.
RULES = (
    (r"\.(query|key|value|mlp_in)\.kernel$", PartitionSpec("fsdp", "tensor")),
    (r"\.(query|key|value|mlp_in)\.bias$", PartitionSpec("tensor")),
    (r"\.(proj|mlp_out)\.kernel$", PartitionSpec("tensor", "fsdp")),
    # The modulations are needed whole beside a stream that is whole in its width.
    (r"\.linear\.kernel$", PartitionSpec("fsdp", None)),
    # The number of codes (2887) has no useful divisor.
    (r"\.to_logits\.kernel$", PartitionSpec("fsdp", None)),
    # If a table were divided by width, so would be the rows that are read from it. The next layer
    # would then exchange rows instead of its kernel.
    (r"\.norm_\w+\.embedding\.embedding$", PartitionSpec()),
    (r"embedding$", PartitionSpec("fsdp")),
)

# Low-rank adapters are small, and whole on every device.
ADAPTER_RULE = (r"\.kernel\.(down|up)$", PartitionSpec())

# Those of stage one. Its networks are small beside their activations, so a device gathers all
# parameters before a step (``gathering``). The codebook and the network of the perceptual distance
# are whole on every device.
AUTOENCODER_RULES = (
    (r"^perceptual\.|(codebook|cluster_sum|embedding)$", PartitionSpec()),
    # Three colours, or one logit, come out of these; three colours go into the others.
    (r"\b(decoder\.conv_out|to_logits)\.kernel$", PartitionSpec("fsdp", None)),
    (r"\.kernel$", PartitionSpec("fsdp")),
)


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of ``config.mesh`` over all devices of all processes.

    Args:
      config: ``config.mesh`` gives the sizes of ``data``, ``fsdp`` and ``tensor``. One of them may
        be -1: it takes what the others leave.
      devices: the devices to use instead, such as those of a topology to compile for.

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
    """The number of parts that the rows of a batch are divided into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def require_divisible(key: str, batch_size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Raises ``UserError`` unless every device gets the same number of rows of every batch.

    Args:
      key: field of the config, for the message.
      batch_size: rows of a batch of all processes.
      mesh: what they are spread over.
      accumulation: number of parts of a batch, which are processed one after the other.
    """
    shards = num_row_shards(mesh)
    if batch_size % (shards * accumulation):
        parts = f"{mesh.shape['data']} x {mesh.shape['fsdp']} devices of data and fsdp"
        if accumulation > 1:
            section = key.split(".")[0]
            parts += f" times config.{section}.gradient_accumulation={accumulation}"
        raise UserError(
            f"config.{key}={batch_size} cannot be divided over {parts}; make it a "
            f"multiple of {shards * accumulation}"
        )
    processes = jax.process_count()
    if processes > 1 and len(local_rows(mesh, batch_size)) * processes != batch_size:
        raise UserError(
            f"config.mesh.tensor={mesh.shape['tensor']} spans processes; each of them has "
            f"{jax.local_device_count()} devices, so choose a divisor of that"
        )


def warn_of_slow_dtype(config: ConfigDict, device: jax.Device) -> None:
    """Logs one line if a model is to compute in bfloat16 on a CPU."""
    if device.platform == "cpu" and config.denoiser.dtype == "bfloat16":
        logging.warning(
            "denoiser.dtype=bfloat16 is slow on a CPU: with some versions of JAX, a training step "
            "takes several times as long as with --config.denoiser.dtype=float32"
        )


def dotted(path: tuple) -> str:
    """'params.denoiser.to_logits.kernel' of a tree path."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


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


def gathering(mesh: Mesh) -> Callable[[Any], Any]:
    """A function of parameters, traced, that makes each of them whole on every device."""
    if mesh.size == 1:
        return lambda tree: tree
    return lambda tree: jax.lax.with_sharding_constraint(tree, replicated(mesh))


def put_like(old: Any, new: Any) -> Any:
    """Host arrays ``new``, which every process has whole, in the places of the arrays ``old``."""

    def put(array, values):
        return jax.make_array_from_callback(
            values.shape, array.sharding, lambda index: values[index]
        )

    return jax.tree.map(put, old, new)


def with_shardings(abstract: Any, placed: Any) -> Any:
    """The abstract leaves with these shardings: what a checkpoint is restored into.

    Args:
      abstract: pytree of ``jax.ShapeDtypeStruct``.
      placed: shardings of its leaves, or of whole branches of it.
    """

    def branch(sharding, leaves):
        return jax.tree.map(lambda x: x.update(sharding=sharding), leaves)

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
    # This transfer is intended. A guard may forbid all others in a step.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(placed, x), batch)


def put_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays on the mesh from host arrays [B, ...] that every process has whole.

    The rows are spread over the devices if their number allows it.
    """

    def put(x):
        placed = replicated(mesh) if x.shape[0] % num_row_shards(mesh) else batch_sharding(mesh)
        return jax.make_array_from_callback(x.shape, placed, lambda index: x[index])

    return jax.tree.map(put, tree)


def fetch(tree: Any) -> Any:
    """Whole NumPy arrays, on every process; each array must fit on one device."""
    return multihost_utils.process_allgather(tree, tiled=True)
