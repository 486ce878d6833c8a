"""Tensors that stay in their file until their values are asked for; safetensors files.

A file may come in parts (``name.pth_aa``, ``name.pth_ab``, ..., as ``split`` makes them), which are
read as if they were joined.
"""

import dataclasses
import io
import itertools
import json
import math
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

from vqd_jax.errors import UserError
from vqd_jax.interop import first_bytes

# Types of numbers, by their names in safetensors files and in PyTorch's.
NUMBER_TYPES = (
    ("F64", "Double", np.float64),
    ("F32", "Float", np.float32),
    ("F16", "Half", np.float16),
    ("BF16", "BFloat16", ml_dtypes.bfloat16),
    ("I64", "Long", np.int64),
    ("I32", "Int", np.int32),
    ("I16", "Short", np.int16),
    ("I8", "Char", np.int8),
    ("U8", "Byte", np.uint8),
    ("BOOL", "Bool", np.bool_),
)
_BY_NAME = {name: np.dtype(kind) for name, _, kind in NUMBER_TYPES}
_NAMES = {kind: name for name, kind in _BY_NAME.items()}
_ALIGNMENT = 64  # bytes
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the format's own library


class FileBytes:
    """The bytes of one file, which may be in parts.

    Args:
      path: the file; or the first part, ``..._aa``; or the name of the parts without ``_aa``.

    Raises:
      UserError: there is no such file, or a part is missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        parts = _parts(self.path)
        try:
            sizes = [part.stat().st_size for part in parts]
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        starts = itertools.accumulate(sizes, initial=0)
        self._parts = list(zip(parts, starts, sizes, strict=False))
        self.size = sum(sizes)

    def read(self, offset: int, size: int) -> np.ndarray:
        """uint8 [size] from ``offset`` on; mapped into memory if one file has all of it."""
        pieces = [
            np.memmap(path, np.uint8, "r", begin, (length,))
            for path, begin, length in self._pieces(offset, size)
        ]
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate([np.empty(0, np.uint8), *pieces])

    def read_into(self, offset: int, target: np.ndarray) -> None:
        """Fills ``target`` uint8 [size] from ``offset`` on, without a further copy."""
        done = 0
        for path, begin, length in self._pieces(offset, target.size):
            with open(path, "rb", buffering=0) as file:
                file.seek(begin)
                end = done + length
                while done < end:
                    # The system reads 2 GB at most in one call.
                    count = file.readinto(target[done:end])
                    if not count:
                        raise UserError(f"{path} became shorter while it was read")
                    done += count

    def _pieces(self, offset: int, size: int) -> list[tuple[Path, int, int]]:
        """(file, offset in it, number of bytes) of every file that has some of these bytes."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise UserError(f"{self.path} is cut short: it ends before byte {offset + size}")
        pieces = []
        for path, start, length in self._parts:
            begin, end = max(offset, start), min(offset + size, start + length)
            if begin < end:
                pieces.append((path, begin - start, end - begin))
        return pieces

    def beginning(self) -> bytes:
        """The first bytes, which tell what a file is."""
        return self.read(0, min(self.size, first_bytes.LENGTH)).tobytes()

    def open(self) -> io.BufferedReader:
        """All of it as a seekable binary file."""
        return io.BufferedReader(_Stream(self))


def _parts(path: Path) -> list[Path]:
    if path.name.endswith("_aa"):
        stem = path.with_name(path.name.removesuffix("_aa"))
    elif path.exists() or not path.with_name(path.name + "_aa").exists():
        if not path.is_file():
            raise UserError(f"{path} is not a file")
        return [path]
    else:
        stem = path
    # All files that look like a part, so that a gap in the middle is noticed.
    present = {p.name for p in path.parent.glob(f"{stem.name}_[a-z][a-z]")}
    letters = map("".join, itertools.product(string.ascii_lowercase, repeat=2))
    wanted = [f"{stem.name}_{letter}" for letter in itertools.islice(letters, len(present))]
    for name in wanted:
        if name not in present:
            raise UserError(f"{path.parent / name} is missing: a part of {stem.name}")
    return [path.with_name(name) for name in wanted]


class _Stream(io.RawIOBase):
    """What ``zipfile`` needs of a file."""

    def __init__(self, source: FileBytes):
        self._source, self._position = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}
        position = origin[whence] + offset
        if position < 0:
            raise OSError("seek before the start of the file")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._source.size - self._position))
        buffer[:size] = self._source.read(self._position, size).data
        self._position += size
        return size


@dataclasses.dataclass(frozen=True, repr=False)
class Tensor:
    """One tensor in a file; ``np.asarray`` reads it each time.

    Attributes:
      source: where the bytes are.
      offset: of the first element, in bytes.
      dtype: NumPy type, ``bfloat16`` from ``ml_dtypes`` included.
      shape: of the tensor.
      strides: in elements; None for row-major.
      swapped: the bytes of an element are in the other order than this machine's.
    """

    source: FileBytes
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    swapped: bool = False

    def __setstate__(self, state: Any) -> None:
        # A file could otherwise give a tensor another place than the one that was checked.
        raise TypeError("a tensor in a file has no state of its own")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        span = self.size
        if self.strides is not None and self.size:
            span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        flat = self.source.read(self.offset, span * self.dtype.itemsize)
        if self.swapped:
            flat = flat.view(f"u{self.dtype.itemsize}").byteswap()
        flat = np.asarray(flat).view(self.dtype)
        if self.strides is None or not self.size:
            array = flat.reshape(self.shape)
        else:
            steps = [s * self.dtype.itemsize for s in self.strides]
            array = np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)
        if copy or dtype is not None:
            return np.array(array, dtype=dtype)
        return array

    def read(self, dtype: np.dtype) -> np.ndarray:
        """The values in a new row-major array, in memory only once.

        The array has the alignment of XLA, so that ``jax.device_put`` on a CPU makes no copy.
        """
        size = self.size * np.dtype(dtype).itemsize
        memory = np.empty(size + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        array = memory[start : start + size].view(dtype).reshape(self.shape)
        if self.strides is None and not self.swapped and array.dtype == self.dtype:
            self.source.read_into(self.offset, memory[start : start + size])
        else:
            array[...] = np.asarray(self)
        return array

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(self)[index]

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}, {self.shape}, {self.source.path.name})"


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, by name.

    Raises:
      UserError: the file is missing, cut short, or not in the format.
    """
    source = FileBytes(path)
    try:
        length = int.from_bytes(source.beginning()[:8].ljust(8, b"\xff"), "little")
        if length > min(_LONGEST_HEADER, source.size):
            words = first_bytes.describe(source.beginning())
            is_other = words and "safetensors" not in words
            told = f"not a safetensors file: it is {words}" if is_other else "cut short"
            raise UserError(f"{path} is {told}")
        header = json.loads(source.read(8, length).tobytes())
        header.pop("__metadata__", None)
        tensors = {name: _entry(source, 8 + length, **entry) for name, entry in header.items()}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a safetensors file: {error!r}") from error
    for name, tensor in tensors.items():
        if tensor.offset + tensor.nbytes > source.size:
            raise UserError(f"{path} is cut short: {name} lies beyond its end")
    return tensors


def _entry(
    source: FileBytes, data: int, dtype: str, shape: list[int], data_offsets: list[int]
) -> Tensor:
    begin, end = data_offsets
    if dtype.startswith("F8_"):
        raise UserError(
            f"{source.path} holds 8-bit floats ({dtype}), which are too coarse to convert; take "
            "the file of the same weights in 16 or 32 bits"
        )
    tensor = Tensor(source, data + begin, _BY_NAME[dtype], tuple(shape))
    if min(begin, *shape, 0) < 0 or end - begin != tensor.nbytes:
        raise ValueError(f"{shape} of {dtype} in bytes {begin} to {end}")
    return tensor


def write_safetensors(
    path: str | Path, arrays: Mapping[str, np.ndarray], dtypes: Mapping[str, np.dtype]
) -> None:
    """Writes a safetensors file; only one tensor is in memory beside ``arrays``.

    (The format's own library holds a copy of all of them.)

    Args:
      path: of the file.
      arrays: by name, in any memory layout.
      dtypes: of the stored tensors, by name.

    Raises:
      OSError: it cannot be written.
    """
    # Wide elements come first, as in the format's library, so that every tensor is aligned.
    names = sorted(arrays, key=lambda name: (-np.dtype(dtypes[name]).itemsize, name))
    # PyTorch programs refuse a file without this entry.
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        dtype, begin = np.dtype(dtypes[name]), end
        end += arrays[name].size * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(arrays[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    bar = tqdm(total=end, desc=Path(path).name, unit="B", unit_scale=True, delay=2)
    with open(path, "wb") as file, bar:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            stored = np.asarray(arrays[name], dtypes[name], order="C").reshape(-1)
            file.write(stored.view(np.uint8))
            bar.update(stored.nbytes)
