"""Tables that say which tensor of another program is which of our parameters, in what layout.

Each source has one table, a list of ``Row``, for reading (``read``) and for writing (``write``).
Our arrays are channels-last and stack the layers of a transformer along a leading axis. Theirs are
PyTorch's: one tensor for each layer.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from vqd_jax.errors import UserError
from vqd_jax.files import flatten, unflatten

_LAYER = "{i}"
# From their array to ours, and back. All are views: the only copy is the final assignment.
_TO_OURS = {
    "same": lambda x: x,
    "linear": lambda x: x.T,  # [out, in] -> [in, out]
    "conv": lambda x: x.transpose(2, 3, 1, 0),  # [out, in, h, w] -> [h, w, in, out]
    "linear_as_conv": lambda x: x.T[None, None],  # [out, in] -> [1, 1, in, out]
}
_TO_THEIRS = {
    "same": lambda x: x,
    "linear": lambda x: x.T,
    "conv": lambda x: x.transpose(3, 2, 0, 1),
    "linear_as_conv": lambda x: x[0, 0].T,
}


# The parameters of a module by its kind: the ends of our name and of theirs, and the layout.
_MODULES = {
    "array": [("", "", "same")],
    "embedding": [(".embedding", ".weight", "same")],
    "norm": [(".scale", ".weight", "same"), (".bias", ".bias", "same")],
    "linear": [(".kernel", ".weight", "linear"), (".bias", ".bias", "same")],
    "conv": [(".kernel", ".weight", "conv"), (".bias", ".bias", "same")],
    "plain_conv": [(".kernel", ".weight", "conv")],
}


class Part(NamedTuple):
    """A network, or an array beside one, as read from a source.

    Attributes:
      config: its sizes: ``AutoencoderConfig``, ``DenoiserConfig``, ``TextEncoderConfig``, or None.
      params: nested dict of float32 arrays, or one array.
      source: where it was found.
    """

    config: Any
    params: Any
    source: str


class Row(NamedTuple):
    """One parameter in both worlds.

    Attributes:
      ours: path in our nested dict, such as ``blocks.self_attention.query.kernel``.
      theirs: name in the source; ``{i}`` stands for the layer of a parameter that we stack.
      layout: ``same``; ``linear``: theirs is [out, in], ours [in, out]; ``conv``: theirs is
        [out, in, h, w], ours [h, w, in, out]; ``linear_as_conv``: theirs is [out, in], ours
        [1, 1, in, out].
      part: (index, count) if theirs packs ``count`` of our parameters, all of one size, along its
        first axis, as a joint projection to queries, keys and values does.
    """

    ours: str
    theirs: str
    layout: str = "same"
    part: tuple[int, int] | None = None


def modules(*table: tuple[str, str, str]) -> list[Row]:
    """The rows of whole modules.

    Args:
      table: (our path, their name, kind) of every module. A kind is ``norm``, ``linear``, ``conv``
        (each with a bias), ``plain_conv`` (without one), ``embedding``, or ``array`` for a
        parameter on its own.
    """
    return [
        Row(ours + our_end, theirs + their_end, layout)
        for ours, theirs, kind in table
        for our_end, their_end, layout in _MODULES[kind]
    ]


def attention(ours: str, theirs: str, projections: str) -> list[tuple[str, str, str]]:
    """What ``modules`` takes for an attention.

    Args:
      ours, theirs: path and name of the attention.
      projections: their names of query, key, value and output, with spaces between them.
    """
    names = zip(("query", "key", "value", "proj"), projections.split(), strict=True)
    return [(f"{ours}.{our}", f"{theirs}.{their}", "linear") for our, their in names]


def prefixed(rows: Iterable[Row], ours: str = "", theirs: str = "") -> list[Row]:
    """The rows with a prefix before each name; the caller writes the dots."""
    return [row._replace(ours=ours + row.ours, theirs=theirs + row.theirs) for row in rows]


def under(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors whose name starts with ``prefix``, named without it."""
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


def read(
    rows: Sequence[Row], tensors: Mapping[str, Any], abstract: Any, source: str
) -> tuple[Any, set[str]]:
    """Our parameters out of their tensors.

    Every array is allocated once and filled tensor by tensor: only one tensor of the source is in
    memory beside the result.

    Args:
      rows: the table of the source.
      tensors: their tensors by name, with ``shape`` and ``dtype``; ``np.asarray`` reads them.
        Values are converted to the dtype of ``abstract``.
      abstract: nested dict of ``jax.ShapeDtypeStruct``.
      source: path or other name of the source, for messages.

    Returns:
      A nested dict of NumPy arrays like ``abstract``, and the names of the tensors that were used.

    Raises:
      UserError: a tensor is missing, of another shape, or not finite; the message gives its name
        in the source and in ours.
      ValueError: the table does not fit the model: an error in this program.
    """
    leaves = flatten(abstract)
    unfilled = set(leaves) - {row.ours for row in rows}
    unknown = {row.ours for row in rows} - set(leaves)
    if unfilled or unknown:
        raise ValueError(f"table lacks {sorted(unfilled)}; model lacks {sorted(unknown)}")
    used = _check(rows, tensors, leaves, source)
    filled = {}
    total = sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves.values())
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, delay=2) as bar:
        for row in rows:
            target = np.empty(leaves[row.ours].shape, leaves[row.ours].dtype)
            for name, slot in _slots(row, target):
                _fill(slot, _part(row, np.asarray(tensors[name])), row, name, source)
                bar.update(slot.nbytes)
            filled[row.ours] = target
    return unflatten(filled, abstract), used


def read_array(tensors: Mapping[str, Any], name: str, source: str) -> np.ndarray:
    """One tensor as a float32 array. Errors as of ``read``."""
    abstract = {name: jax.ShapeDtypeStruct(tensors[name].shape, np.float32)}
    return read([Row(name, name)], tensors, abstract, source)[0][name]


def write(rows: Sequence[Row], params: Any) -> dict[str, np.ndarray]:
    """Our parameters as their tensors, by name and in their layout: the reverse of ``read``.

    They are views of ``params``, except where parts are packed.
    """
    leaves, tensors, packed = flatten(params), {}, {}
    for row in rows:
        for name, slot in _slots(row, np.asarray(leaves[row.ours])):
            array = _TO_THEIRS[row.layout](slot)
            if row.part is None:
                tensors[name] = array
            else:
                packed.setdefault(name, [None] * row.part[1])[row.part[0]] = array
    return tensors | {name: np.concatenate(parts) for name, parts in packed.items()}


def require_all_used(
    names: Iterable[str], used: Iterable[str], ignored: Sequence[str], source: str
) -> None:
    """Raises ``UserError`` if the source has tensors that were not used.

    Args:
      names: of all tensors of the source.
      used: names of those that were read.
      ignored: regular expressions of names that may be left over.
      source: path or other name of the source, for messages.
    """
    left = set(names) - set(used)
    left = sorted(n for n in left if not any(re.fullmatch(pattern, n) for pattern in ignored))
    if left:
        raise UserError(
            f"{source} has {len(left)} tensors that the model has no place for: {_some(left)}"
        )


def _check(rows, tensors, leaves, source) -> set[str]:
    """Checks names and shapes before any value is read, so that a wrong file fails at once."""
    used, missing, wrong = set(), [], []
    for row in rows:
        leaf = leaves[row.ours]
        for name, slot in _slots(row, np.broadcast_to(np.int8(0), leaf.shape)):
            used.add(name)
            shape = _TO_THEIRS[row.layout](slot).shape
            if row.part is not None:
                shape = (shape[0] * row.part[1], *shape[1:])
            if name not in tensors:
                missing.append(f"{name} (ours: {row.ours})")
            elif tuple(tensors[name].shape) != shape:
                found = tuple(tensors[name].shape)
                wrong.append(f"{name} (ours: {row.ours}) is {found} instead of {shape}")
    if missing:
        raise UserError(f"{source} lacks {len(missing)} tensors: {_some(missing)}")
    if wrong:
        raise UserError(f"{source} does not fit the config: {_some(wrong)}")
    return used


def _slots(row: Row, array: np.ndarray):
    """(their name, the part of our array that it fills) of every layer, or of the one array."""
    if _LAYER not in row.theirs:
        return [(row.theirs, array)]
    return [(row.theirs.replace(_LAYER, str(i)), array[i, ...]) for i in range(array.shape[0])]


def _part(row: Row, array: np.ndarray) -> np.ndarray:
    if row.part is None:
        return array
    index, count = row.part
    size = array.shape[0] // count
    return array[index * size : (index + 1) * size]


def _fill(slot: np.ndarray, array: np.ndarray, row: Row, name: str, source: str) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        slot[...] = _TO_OURS[row.layout](array)
    if np.issubdtype(slot.dtype, np.inexact) and not np.isfinite(slot).all():
        raise UserError(f"{source}: {name} (ours: {row.ours}) has values that are not finite")


def _some(items: Sequence[str], most: int = 5) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
