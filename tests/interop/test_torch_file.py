"""Files of PyTorch without PyTorch: real ones, every type, and every way to be bad."""

import pickle
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from vqd_jax.errors import UserError
from vqd_jax.interop import tensors, torch_file

sys.path.insert(0, str(Path(__file__).parent))
from torch_writer import Call, Name, tensor, write  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"


def test_a_training_checkpoint_written_by_pytorch():
    loaded = torch_file.load(GOLDEN / "text_model.pth")
    assert list(loaded)[:4] == ["last_epoch", "last_iter", "model", "ema"]
    null = loaded["model"]["transformer.empty_text_embed"]
    assert (null.shape, null.dtype) == ((77, 64), np.float64)
    expected = np.load(GOLDEN / "text_model.npz")["null_embed"]
    ours = np.asarray(loaded["ema"]["empty_text_embed"]).astype(np.float32)
    np.testing.assert_array_equal(ours, expected)
    half = loaded["model"]["transformer.condition_emb.text_projection"]
    assert half.dtype == np.float16
    # Two names of one storage.
    model = loaded["model"]
    names = [f"content_codec.{part}.quantize.embed.weight" for part in ("enc", "dec")]
    assert model[names[0]].offset == model[names[1]].offset


def test_a_tensor_alone():
    mapping = torch_file.load(GOLDEN / "class_model_mapping.pt")
    expected = np.load(GOLDEN / "class_model.npz")["full_to_quantize"]
    assert mapping.dtype == np.int64
    np.testing.assert_array_equal(np.asarray(mapping), expected)


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("FloatStorage", np.float32),
        ("DoubleStorage", np.float64),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("LongStorage", np.int64),
        ("IntStorage", np.int32),
        ("ShortStorage", np.int16),
        ("CharStorage", np.int8),
        ("ByteStorage", np.uint8),
        ("BoolStorage", np.bool_),
    ],
)
@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_types_and_byte_orders(tmp_path, kind, dtype, byteorder):
    array = np.array([[0, 1, 2], [3, 5, 1]]).astype(dtype)
    stored = array
    if byteorder == "big":
        stored = array.view(f"u{array.itemsize}").byteswap().view(dtype)
    write(tmp_path / "x.pt", {"x": tensor(kind, stored)}, byteorder=byteorder.encode())
    found = torch_file.load(tmp_path / "x.pt")["x"]
    assert (found.dtype, found.shape) == (dtype, (2, 3))
    np.testing.assert_array_equal(np.asarray(found), array)


def test_views_of_a_storage(tmp_path):
    base = np.arange(24, dtype=np.float32)
    content = [
        tensor("FloatStorage", base, shape=(4, 3), strides=(1, 4), offset=12),
        tensor("FloatStorage", base, shape=(2, 2), strides=(0, 5), offset=3),
        tensor("FloatStorage", base, shape=(), strides=(), offset=23),
        tensor("FloatStorage", base, shape=(0, 4), strides=(4, 1)),
        Call("torch._utils _rebuild_parameter", tensor("FloatStorage", base), True, {}),
    ]
    write(tmp_path / "x.pt", content)
    transposed, repeated, scalar, empty, parameter = torch_file.load(tmp_path / "x.pt")
    np.testing.assert_array_equal(np.asarray(transposed), base[12:].reshape(3, 4).T)
    np.testing.assert_array_equal(np.asarray(repeated), [[3, 8], [3, 8]])
    assert np.asarray(scalar) == 23 and np.asarray(empty).shape == (0, 4)
    np.testing.assert_array_equal(np.asarray(parameter), base)


def test_a_file_in_parts(tmp_path):
    data = (GOLDEN / "class_model_mapping.pt").read_bytes()
    for part, start in (("aa", 0), ("ab", 700), ("ac", 1400)):
        (tmp_path / f"m.pth_{part}").write_bytes(data[start : start + 700])
    whole = np.asarray(torch_file.load(GOLDEN / "class_model_mapping.pt"))
    np.testing.assert_array_equal(np.asarray(torch_file.load(tmp_path / "m.pth")), whole)


def test_a_script_archive_is_a_state_dict(tmp_path):
    weight = np.arange(6, dtype=np.float16).reshape(2, 3)
    linear = {"weight": tensor("HalfStorage", weight, "1"), "training": False}
    inner = Call("__torch__.torch.nn.modules.linear.___torch_mangle_0 Linear", state=linear)
    content = Call("__torch__ CLIP", state={"visual": inner, "sizes": [1, 2], "name": "x"})
    code = ("archive/code/__torch__.py", b"import os; os.system('false')")
    write(tmp_path / "clip.pt", content, members=[code])
    loaded = torch_file.load(tmp_path / "clip.pt")
    assert list(loaded) == ["visual.weight"]
    np.testing.assert_array_equal(np.asarray(loaded["visual.weight"]), weight)


def test_numbers_of_numpy_and_names_of_callbacks(tmp_path):
    kind = Call("numpy dtype", "f8", False, True)
    data = Call("_codecs encode", np.float64(2.5).tobytes().decode("latin1"), "latin1")
    callback = "pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint"
    content = [(Name(callback), 3), Call("numpy.core.multiarray scalar", kind, data)]
    write(tmp_path / "x.ckpt", content)
    pair, number = torch_file.load(tmp_path / "x.ckpt")
    assert pair == (callback.replace(" ", "."), 3)
    assert number == 2.5 and isinstance(number, float)


@pytest.mark.parametrize(
    "name", ["os system", "builtins eval", "posix system", "torch.hub load", "__builtin__ exec"]
)
def test_a_pickle_that_asks_for_more_is_refused_with_the_name(tmp_path, name):
    marker = tmp_path / "ran"
    content = {"a": 1, "b": Call(name, f"touch {marker}")}
    write(tmp_path / "bad.pth", content)
    with pytest.raises(UserError, match=f"bad.pth asks for {name.replace(' ', '.')}"):
        torch_file.load(tmp_path / "bad.pth")
    assert not marker.exists()


def test_a_name_that_may_only_be_mentioned_cannot_be_called(tmp_path):
    callback = "pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint"
    write(tmp_path / "bad.pth", Call(callback, "x"))
    with pytest.raises(UserError, match="bad.pth is damaged"):
        torch_file.load(tmp_path / "bad.pth")


@pytest.mark.parametrize(
    "module, name, state",
    [
        ("torch", "FloatStorage", {"dtype": 1}),
        ("torch", "FloatStorage", (3, "<", None, None, None, -1, -1, 0)),
        ("torch._utils", "_rebuild_tensor_v2", {"ours": 1}),
        ("torch._utils", "_rebuild_tensor_v2", (None, {"ours": 1, "__defaults__": (1,)})),
        ("__torch__", "Module", (None, {"__setstate__": 1})),
        ("torch.nn.parameter", "Parameter", (None, {"__setstate__": 1})),
    ],
)
def test_a_pickle_cannot_change_what_the_next_one_meets(tmp_path, module, name, state):
    stream = b"\x80\x02c" + f"{module}\n{name}\n".encode()
    stream += pickle.dumps(state, 2)[2:-1] + pickle.BUILD + pickle.STOP
    with zipfile.ZipFile(tmp_path / "bad.pth", "w") as archive:
        archive.writestr("archive/data.pkl", stream)
    with pytest.raises(UserError, match="bad.pth is damaged"):
        torch_file.load(tmp_path / "bad.pth")
    mapping = torch_file.load(GOLDEN / "class_model_mapping.pt")
    assert np.asarray(mapping).shape == (37,)


def test_a_pickle_cannot_move_a_tensor(tmp_path):
    array = np.arange(4, dtype=np.float32)
    moved = tensor("FloatStorage", array)
    # Strides that lead out of the storage, after they were checked.
    state = {"shape": (2, 2), "strides": (-1_000_000, 1)}
    content = Call(moved.name, *moved.arguments, state=state, make=pickle.REDUCE)
    write(tmp_path / "bad.pth", content)
    with pytest.raises(UserError, match="bad.pth is damaged: .*no state of its own"):
        torch_file.load(tmp_path / "bad.pth")


@pytest.mark.parametrize("member", ["/etc/x", "../x", "archive/../../x", "archive\\..\\x"])
def test_paths_that_lead_out_are_refused(tmp_path, member):
    write(tmp_path / "bad.pth", {}, members=[(member, b"")])
    with pytest.raises(UserError, match="leads out of it"):
        torch_file.load(tmp_path / "bad.pth")


@pytest.mark.parametrize(
    "shape, strides, offset",
    [((25,), (1,), 0), ((2, 3), (20, 5), 0), ((24,), (1,), 1), ((2,), (-1,), 4), ((2,), (), 0)],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, shape, strides, offset):
    base = np.zeros(24, np.float32)
    content = tensor("FloatStorage", base, shape=shape, strides=strides, offset=offset)
    write(tmp_path / "bad.pth", content)
    with pytest.raises(UserError, match="bad.pth is damaged"):
        torch_file.load(tmp_path / "bad.pth")


def test_a_storage_that_lies_about_its_size_is_refused(tmp_path):
    array = np.zeros(4, np.float32)
    write(tmp_path / "bad.pth", tensor("DoubleStorage", array))
    with pytest.raises(UserError, match="archive/data/0 has 16 of 32 bytes"):
        torch_file.load(tmp_path / "bad.pth")


def test_compressed_storages_are_refused(tmp_path):
    content = tensor("FloatStorage", np.zeros(4, np.float32))
    write(tmp_path / "bad.pth", content, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        torch_file.load(tmp_path / "bad.pth")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_cut_short_is_refused(tmp_path, share):
    data = (GOLDEN / "patch_vqgan.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match="cut.pth is not a PyTorch file, or is cut short"):
        torch_file.load(tmp_path / "cut.pth")


def test_a_damaged_pickle_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00(X\x05\x00")
    with pytest.raises(UserError, match="bad.pth is damaged"):
        torch_file.load(tmp_path / "bad.pth")


def test_other_files_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "x")
    with pytest.raises(UserError, match="not one of PyTorch"):
        torch_file.load(tmp_path / "other.zip")
    with pytest.raises(UserError, match="is not a file"):
        torch_file.load(tmp_path / "nothing.pth")


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    write(tmp_path / "x.pt", {"x": tensor("FloatStorage", np.arange(4, dtype=np.float32))})
    found = torch_file.load(tmp_path / "x.pt")["x"]
    assert isinstance(found, tensors.Tensor)
    data = (
        (tmp_path / "x.pt").read_bytes().replace(np.float32(3).tobytes(), np.float32(9).tobytes())
    )
    (tmp_path / "x.pt").write_bytes(data)
    np.testing.assert_array_equal(np.asarray(found), [0, 1, 2, 9])
