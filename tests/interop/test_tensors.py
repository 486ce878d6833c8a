"""Tensors in files: safetensors as its own library writes it, parts joined, damage named."""

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vqd_jax.errors import UserError
from vqd_jax.interop import tensors


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(3, 4)).astype(np.float32),
        "half": rng.normal(size=(5,)).astype(np.float16),
        "brain": rng.normal(size=(2, 2)).astype(ml_dtypes.bfloat16),
        "count": np.array(7, np.int64),
        "none": np.zeros((0, 3), np.float32),
    }


@pytest.fixture
def file(tmp_path, arrays):
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def split(path, size):
    data = path.read_bytes()
    for index, start in enumerate(range(0, len(data), size)):
        part = path.with_name(f"{path.name}_a{chr(ord('a') + index)}")
        part.write_bytes(data[start : start + size])
    path.unlink()


def test_safetensors(file, arrays):
    found = tensors.read_safetensors(file)
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        assert (found[name].ndim, found[name].nbytes) == (array.ndim, array.nbytes)
        np.testing.assert_array_equal(np.asarray(found[name]), array)
    np.testing.assert_array_equal(found["a.weight"][1, :2], arrays["a.weight"][1, :2])
    assert np.asarray(found["half"], np.float32).dtype == np.float32


@pytest.mark.parametrize("named", ["model.safetensors", "model.safetensors_aa"])
def test_parts_are_joined(file, arrays, named):
    split(file, 41)
    found = tensors.read_safetensors(file.with_name(named))
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(found[name]), array)


def test_a_missing_part_is_named(file):
    split(file, 41)
    file.with_name("model.safetensors_ac").unlink()
    with pytest.raises(UserError, match="model.safetensors_ac is missing"):
        tensors.read_safetensors(file)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.safetensors is not a file"):
        tensors.read_safetensors(tmp_path / "nothing.safetensors")


def test_a_file_cut_short_is_named(file):
    data = file.read_bytes()
    for size in (4, 60, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(UserError, match="model.safetensors is cut short"):
            tensors.read_safetensors(file)


@pytest.mark.parametrize(
    "header",
    [b"[1]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}', b"{"],
)
def test_another_format_is_named(tmp_path, header):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(UserError, match="odd.safetensors is not a safetensors file"):
        tensors.read_safetensors(path)


def test_the_formats_own_library_reads_what_is_written(tmp_path, arrays):
    path = tmp_path / "ours.safetensors"
    arrays = arrays | {"turned": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    dtypes = {name: array.dtype for name, array in arrays.items()}
    tensors.write_safetensors(path, arrays, dtypes | {"turned": np.dtype(np.float16)})
    theirs, ours = load_file(path), tensors.read_safetensors(path)
    assert set(theirs) == set(ours) == set(arrays)
    for name, array in arrays.items():
        assert theirs[name].dtype == (np.float16 if name == "turned" else array.dtype)
        np.testing.assert_array_equal(theirs[name], array)
        np.testing.assert_array_equal(np.asarray(ours[name]), array)
        assert ours[name].offset % ours[name].dtype.itemsize == 0


def test_a_tensor_is_read_into_memory_that_jax_takes_as_it_is(file, arrays):
    split(file, 100)
    found = tensors.read_safetensors(file)
    for name, array in arrays.items():
        for dtype in (array.dtype, np.dtype(np.float32)):
            read = found[name].read(dtype)
            assert read.dtype == dtype and (read.ctypes.data % 64 == 0 or not read.size)
            np.testing.assert_array_equal(read, array.astype(dtype))
    read = found["a.weight"].read(np.float32)
    placed = jax.device_put(read, jax.devices("cpu")[0])
    assert placed.unsafe_buffer_pointer() == read.ctypes.data
