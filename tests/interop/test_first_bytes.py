import io
import json
import tarfile

import pytest

from vqd_jax.errors import UserError
from vqd_jax.interop import tensors, torch_file


def tar():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights"))
    return data.getvalue()


FILES = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n": "a pointer of Git LFS",
    b"\n<!DOCTYPE html><html><body>Not found": "a page in HTML",
    b"<?xml version='1.0'?><Error><Code>AccessDenied": "a page in XML",
    b'{"error": "Repository not found"}': "a text in JSON",
    b"\x1f\x8b\x08\0" + bytes(50): "a gzip archive; unpack it first",
    tar(): "a tar archive; unpack it first",
}


@pytest.mark.parametrize(("data", "words"), FILES.items())
def test_what_holds_no_weights_is_named_for_what_it_is(tmp_path, data, words):
    for read, name in ((torch_file.load, "a.pth"), (tensors.read_safetensors, "a.safetensors")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name} is not a .* file: it is {words}"):
            read(tmp_path / name)


def test_safetensors_by_another_name_are_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a.pth").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match=r"a safetensors file; its name must end in \.safetensors"):
        torch_file.load(tmp_path / "a.pth")


def test_8_bit_floats_are_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match=r"holds 8-bit floats \(F8_E4M3\)"):
        tensors.read_safetensors(path)
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds 8-bit floats"):
        torch_file.load(tmp_path / "a.pth")
