"""Files of the format before PyTorch 1.6, as torchvision's first ones are: good and bad ones."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from vqd_jax.errors import UserError
from vqd_jax.interop import tensors, torch_file

sys.path.insert(0, str(Path(__file__).parent))
from torch_writer import Call, Name, tensor, write_old  # noqa: E402

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.array([7, -8], np.int64)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "old.pth"


@pytest.mark.parametrize("little", [True, False])
def test_tensors_of_several_storages(path, little):
    content = {
        "a": tensor("FloatStorage", A, "140"),
        "turned": tensor("FloatStorage", A, "140", shape=(3, 2), strides=(1, 3)),
        "b": tensor("LongStorage", B, "77"),
        "last": tensor("FloatStorage", A, "140", shape=(2,), strides=(1,), offset=4),
    }
    write_old(path, content, little=little)
    found = torch_file.load(path)
    assert isinstance(found["a"], tensors.Tensor) and list(found) == list(content)
    np.testing.assert_array_equal(np.asarray(found["a"]), A)
    np.testing.assert_array_equal(np.asarray(found["turned"]), A.T)
    np.testing.assert_array_equal(np.asarray(found["b"]), B)
    np.testing.assert_array_equal(np.asarray(found["last"]), [4, 5])


def test_what_pytorch_writes(path):
    torch = pytest.importorskip("torch")
    saved = {
        "a": torch.arange(12.0).reshape(3, 4).T,
        "b": torch.nn.Parameter(torch.ones(2, dtype=torch.float16)),
        "epoch": 3,
        "none": torch.zeros(0),
    }
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    found = torch_file.load(path)
    assert found["epoch"] == 3 and found["none"].shape == (0,)
    np.testing.assert_array_equal(np.asarray(found["a"]), saved["a"].numpy())
    np.testing.assert_array_equal(np.asarray(found["b"]), [1, 1])
    assert found["b"].dtype == np.float16


@pytest.mark.parametrize("form", ["called", "made", "in state"])
def test_the_first_parameters_and_tensors(path, form):
    old = Call("torch._utils _rebuild_tensor", *tensor("FloatStorage", A).arguments[:4])
    name = "torch.nn.parameter Parameter"
    parameter = {
        "called": Call(name, old, True),
        "made": Call(name, old, state=(True, False, {})),
        "in state": Call(name, state=(old, None, {}, True, False)),
    }[form]
    write_old(path, {"x": parameter})
    np.testing.assert_array_equal(np.asarray(torch_file.load(path)["x"]), A)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"version": 1002}, "damaged.*version 1002"),
        ({"keys": []}, "damaged.*keys of the storages"),
        ({"keys": ["0", "1"]}, "damaged.*keys of the storages"),
        ({"keys": ["0", "0"]}, "damaged.*keys of the storages"),
        ({"keys": 5}, "damaged.*keys of the storages"),
        ({"count": 5}, "damaged.*storage 0 has 5 of 6"),
        ({"count": -6}, "damaged.*of 6 elements"),
        ({"count": 2**62}, "damaged.*of 6 elements"),
        ({"view": ("1", 0, 3)}, "damaged.*a view of another"),
        ({"cut": -1}, "cut short: it lacks part of storage 0"),
        ({"cut": -24}, "cut short: it lacks part of storage 0"),
        ({"cut": -30}, "cut short"),
        ({"cut": 60}, "damaged"),
        ({"cut": 15}, "damaged"),
        ({"cut": 10}, "not a PyTorch file"),
    ],
)
def test_bad_files_are_refused(path, options, message):
    write_old(path, {"x": tensor("FloatStorage", A)}, **options)
    with pytest.raises(UserError, match=f"old.pth.*{message}"):
        torch_file.load(path)


@pytest.mark.parametrize(
    "content",
    [
        tensor("FloatStorage", A, shape=(7,), strides=(1,)),
        tensor("FloatStorage", A, shape=(2,), strides=(-1,), offset=4),
        tensor("FloatStorage", A, offset=1),
        # One storage with two types, which have two sizes.
        [tensor("FloatStorage", A), tensor("DoubleStorage", A.astype(np.float64))],
        Call("torch._utils _rebuild_tensor", 3, 0, (1,), (1,)),
        Call("torch.nn.parameter Parameter", state={"data": 1}),
    ],
)
def test_tensors_that_lie_are_refused(path, content):
    write_old(path, {"x": content})
    with pytest.raises(UserError, match="old.pth is damaged"):
        torch_file.load(path)


@pytest.mark.parametrize("name", ["os system", "builtins eval", "torch.storage _load_from_bytes"])
@pytest.mark.parametrize("wrap", [Name, lambda name: Call(name, "true")])
def test_other_names_are_refused(path, name, wrap):
    write_old(path, {"x": wrap(name)})
    with pytest.raises(UserError, match="asks for .*, which could run code"):
        torch_file.load(path)


def test_names_in_the_other_pickles_are_refused(path):
    write_old(path, {"x": tensor("FloatStorage", A)})
    start = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    assert path.read_bytes().startswith(start)
    path.write_bytes(start + b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
    with pytest.raises(UserError, match="asks for os.system"):
        torch_file.load(path)
