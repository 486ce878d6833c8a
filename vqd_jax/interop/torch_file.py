"""Reads PyTorch files without PyTorch, and without executing anything in them.

A ``.pth``, ``.pt`` or ``.ckpt`` file is a zip archive of one pickle and the raw storages. Before
PyTorch 1.6 it was a row of pickles and storages; both are read. The unpickler knows a short list of
names, imports none of them, and refuses a file that asks for any other. Tensors stay in the file
(``tensors.Tensor``).

In a TorchScript archive (CLIP was published as one) modules are nested dictionaries of tensors; its
code is never looked at.
"""

import collections
import dataclasses
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

from vqd_jax.errors import UserError
from vqd_jax.interop import first_bytes
from vqd_jax.interop.tensors import NUMBER_TYPES, FileBytes, Tensor

# The magic number of the format before PyTorch 1.6, pickled.
_OLD_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Published autoencoder files have these classes as keys of a dictionary, and use them for no more.
_NAMES_ONLY = {
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
}


def load(path: str | Path) -> Any:
    """What ``torch.save`` wrote: nested dicts and lists with ``Tensor`` leaves.

    Args:
      path: a file, or the first of its parts (see ``tensors.FileBytes``).

    Returns:
      The saved object. For a TorchScript archive its state dict: {"visual.conv1.weight": Tensor}.

    Raises:
      UserError: the file is missing, damaged or cut short, or its pickle asks for a name that is
        not on the list; the message tells which.
    """
    source = FileBytes(path)
    try:
        with source.open() as stream:
            if stream.read(len(_OLD_START)) == _OLD_START:
                return _without_parameters(_Old(source, stream).load())
            with zipfile.ZipFile(stream) as archive:
                members = _Archive(source, archive)
                loaded = _Unpickler(members.open_pickle(), members).load()
                return _state_dict(loaded) if isinstance(loaded, _ScriptModule) else loaded
    except zipfile.BadZipFile as error:
        words = first_bytes.describe(source.beginning())
        told = f": it is {words}" if words else f", or is cut short: {error}"
        raise UserError(f"{path} is not a PyTorch file{told}") from error
    except UserError:
        raise
    # In a damaged pickle names and values are mixed up, which raises nearly any exception.
    except Exception as error:
        raise UserError(f"{path} is damaged: {error!r}") from error


# Keys under which programs put the state dict of a model.
_CONTAINERS = (
    "state_dict", "model", "model_state_dict", "module", "net", "network", "generator", "params",
    "weights", "shadow", "shadow_params",
)  # fmt: skip
# What wrappers of a model write before the names of its tensors: DataParallel, Lightning.
_PREFIXES = ("module.", "model.")
# What `torch.compile` writes before the names of a module, at any depth.
_COMPILED = "_orig_mod."


def named_tensors(loaded: Any) -> dict[str, Tensor]:
    """The tensors of a state dict by name, without what wraps it; {} of anything else.

    Args:
      loaded: what ``load`` returned, or a part of it.
    """
    if not isinstance(loaded, Mapping):
        return {}
    found = {n: x for n, x in loaded.items() if isinstance(n, str) and hasattr(x, "shape")}
    inner = [loaded[key] for key in _CONTAINERS if isinstance(loaded.get(key), Mapping)]
    if inner and (deeper := named_tensors(inner[0])):
        return deeper
    found = {name.replace(_COMPILED, ""): x for name, x in found.items()}
    while prefix := _common_prefix(found):
        found = {name.removeprefix(prefix): x for name, x in found.items()}
    return found


def _common_prefix(names: Iterable[str]) -> str:
    """The prefix of a wrapper that all names have; ''."""
    names = list(names)
    for prefix in _PREFIXES:
        if names and all(name.startswith(prefix) for name in names):
            return prefix
    return ""


class _Archive:
    """A zip archive, in which it finds the pickle and the storages."""

    def __init__(self, source: FileBytes, archive: zipfile.ZipFile):
        self.source = source
        for name in archive.namelist():
            if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
                raise UserError(f"{source.path} holds {name!r}: a path that leads out of it")
        roots = [n for n in archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(roots) != 1:
            raise UserError(f"{source.path} is a zip file, but not one of PyTorch: no data.pkl")
        self._root = roots[0].removesuffix("data.pkl")
        self._archive = archive
        order = f"{self._root}byteorder"
        big = order in archive.namelist() and archive.read(order) == b"big"
        self.swapped = big != (np.dtype("=i2").newbyteorder(">") == np.dtype("=i2"))

    def open_pickle(self) -> Any:
        return self._archive.open(f"{self._root}data.pkl")

    def storage(self, key: str, size: int, width: int) -> int:
        """Offset in the file of storage ``key``, which must have ``size`` elements."""
        size *= width
        name = f"{self._root}data/{key}"
        try:
            member = self._archive.getinfo(name)
        except KeyError as error:
            raise UserError(f"{self.source.path} lacks its member {name}") from error
        if member.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{self.source.path}: {name} is compressed, which PyTorch never does")
        if member.file_size < size:
            raise UserError(f"{self.source.path}: {name} has {member.file_size} of {size} bytes")
        # The local header has padding that the central directory does not tell.
        header = self.source.read(member.header_offset, 30)
        name_size, extra_size = header[26:30].view("<u2").tolist()
        offset = member.header_offset + 30 + name_size + extra_size
        if offset + size > self.source.size:
            raise UserError(f"{self.source.path} is cut short: {name} lies beyond its end")
        return offset


class _Old:
    """A file of the format before PyTorch 1.6: pickles, then the storages one after the other.

    The pickles are a magic number, a version, facts of the machine, the saved object, and the keys
    of the storages in their order. A storage is its number of elements, int64, and the elements.
    """

    def __init__(self, source: FileBytes, stream: BinaryIO):
        self.source, self._stream = source, stream
        self._sizes: dict[str, tuple[int, int]] = {}
        self._offsets: dict[str, int] = {}

    def load(self) -> Any:
        self._stream.seek(0)
        _, version, machine = (self._next() for _ in range(3))
        if version != 1001 or not isinstance(machine, dict):
            raise ValueError(f"version {version}")
        self.swapped = machine.get("little_endian") != (sys.byteorder == "little")
        start = self._stream.tell()
        # The object stands before the places of its storages, so it is read twice.
        self._next()
        self._find_storages(self._next())
        self._stream.seek(start)
        return self._next()

    def _next(self) -> Any:
        return _Unpickler(self._stream, self).load()

    def _find_storages(self, keys: Any) -> None:
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(self._sizes):
            raise ValueError("the keys of the storages are not those of the tensors")
        offset = self._stream.tell()
        for key in map(str, keys):
            size, width = self._sizes[key]
            order = "big" if self.swapped == (sys.byteorder == "little") else "little"
            count = int.from_bytes(self.source.read(offset, 8).tobytes(), order)
            if count != size:
                raise ValueError(f"storage {key} has {count} of {size} elements")
            self._offsets[key] = offset + 8
            offset += 8 + size * width
            if offset > self.source.size:
                raise UserError(f"{self.source.path} is cut short: it lacks part of storage {key}")

    def storage(self, key: str, size: int, width: int) -> int:
        """Offset in the file of storage ``key``; 0 while it is not known."""
        if self._sizes.setdefault(key, (size, width)) != (size, width):
            raise ValueError(f"storage {key} has two sizes")
        return self._offsets.get(key, 0)


class _ScriptModule:
    """A module of a TorchScript archive: its attributes."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.attributes = dict(state)


def _state_dict(module: _ScriptModule, prefix: str = "") -> dict[str, Tensor]:
    tensors = {}
    for name, value in module.attributes.items():
        if isinstance(value, _ScriptModule):
            tensors |= _state_dict(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            tensors[prefix + name] = value
    return tensors


def _rebuild_tensor(storage: Tensor, offset, shape, strides, *_of_autograd) -> Tensor:
    """A tensor that views ``storage``, which has one axis."""
    shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
    if len(shape) != len(strides) or min(offset, 0, *shape, *strides) < 0:
        raise ValueError(f"tensor of shape {shape}, strides {strides}, offset {offset}")
    if 0 not in shape:
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if last >= storage.size:
            raise ValueError(f"tensor of shape {shape} is larger than its storage")
    start = storage.offset + offset * storage.dtype.itemsize
    if strides == _row_major(shape):
        strides = None
    return dataclasses.replace(storage, offset=start, shape=shape, strides=strides)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))


class _OldParameter:
    """A parameter as the first versions pickled it: its tensor is an argument, or in the state."""

    def __new__(cls, data=None, requires_grad=True):
        # A pickle makes one with or without a call of __init__.
        made = super().__new__(cls)
        made.data = data
        return made

    def __setstate__(self, state):
        if len(state) == 5:
            self.data = state[0]


def _without_parameters(loaded: Any) -> Any:
    """A dictionary with the tensors of its parameters."""
    if not isinstance(loaded, dict):
        return loaded
    plain = {}
    for key, value in loaded.items():
        if isinstance(value, _OldParameter):
            value = value.data
            if not isinstance(value, Tensor):
                raise ValueError(f"the parameter {key!r} has no tensor")
        plain[key] = value
    return plain


def _rebuild_parameter(tensor, requires_grad, hooks) -> Tensor:
    return tensor


class _ScalarType:
    """Stands for ``numpy.dtype`` in a pickled NumPy number."""

    def __init__(self, name, align=False, copy=True):
        self.dtype = np.dtype(str(name))

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


def _scalar(kind, value):
    """A NumPy number as a Python one."""
    return np.frombuffer(value, kind.dtype, 1)[0].item()


def _encode(text, encoding):
    """Bytes, as the second pickle protocol writes them."""
    if encoding != "latin1":
        raise ValueError(f"bytes written as {encoding}")
    return text.encode("latin1")


class _StorageType(NamedTuple):
    """Stands for a class like ``torch.FloatStorage``."""

    dtype: np.dtype


class _Function(NamedTuple):
    """Stands for a function of theirs. A pickle cannot set its attributes, as it could ours."""

    ours: Callable

    def __call__(self, *arguments: Any) -> Any:
        return self.ours(*arguments)


_FUNCTIONS = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.Size": tuple,
    "torch.device": str,
    "torch.jit._pickle.build_intlist": list,
    "torch.jit._pickle.build_doublelist": list,
    "torch.jit._pickle.build_boollist": list,
    "torch.jit._pickle.build_tensorlist": list,
    "numpy.dtype": _ScalarType,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "_codecs.encode": _encode,
}
_KNOWN = {
    **{name: _Function(function) for name, function in _FUNCTIONS.items()},
    **{f"torch.{name}Storage": _StorageType(np.dtype(x)) for _, name, x in NUMBER_TYPES},
    **{name: name for name in _NAMES_ONLY},
}


class _Unpickler(pickle.Unpickler):
    """Resolves the names of ``_KNOWN`` to functions of this module, and no others."""

    def __init__(self, stream: IO[bytes], archive: "_Archive | _Old"):
        # Files that Python 2 wrote have strings of bytes.
        super().__init__(stream, encoding="utf-8")
        self._archive = archive
        # Every file has a class of its own: a pickle may set attributes of classes.
        self._script_module = type("ScriptModule", (_ScriptModule,), {})
        self._parameter = type("Parameter", (_OldParameter,), {})

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get(f"{module}.{name}")
        if known is not None:
            return known
        if module == "__torch__" or module.startswith("__torch__."):
            return self._script_module
        if (module, name) == ("torch.nn.parameter", "Parameter"):
            return self._parameter
        if name == "_rebuild_tensor_v3":
            raise UserError(
                f"{self._archive.source.path} holds 8-bit floats or other rare numbers, too coarse "
                "to convert; take the file of the same weights in 16 or 32 bits"
            )
        raise UserError(
            f"{self._archive.source.path} asks for {module}.{name}, which could run code; only "
            "files of plain tensors are read. If the file is yours, save its state dict instead."
        )

    def persistent_load(self, pid: Any) -> Tensor:
        kind, storage_type, key, _location, size, *view = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or size < 0:
            raise ValueError(f"unknown storage {pid!r}")
        # The old format could store a part of a storage, which newer ones never do.
        if view not in ([], [None]):
            raise ValueError(f"storage {key} is a view of another one")
        archive, dtype = self._archive, storage_type.dtype
        offset = archive.storage(str(key), int(size), dtype.itemsize)
        return Tensor(archive.source, offset, dtype, (int(size),), swapped=archive.swapped)
