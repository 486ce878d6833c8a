"""Weights of the networks that see, for the perceptual distance.

SqueezeNet's and the LPIPS weights of VGG16's layers are packaged in ``assets``, with their
licences. ``python docs/make_perceptual.py`` made the files. VGG16 itself is read from torchvision's
file, which the user has.
"""

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vqd_jax.errors import UserError
from vqd_jax.interop import folder, tensors, torch_file
from vqd_jax.models import perceptual
from vqd_jax.models.perceptual import PerceptualConfig

NAMES = ("squeezenet", "random", "vgg16")

# Places of the convolutions in torchvision's ``features``.
_VGG_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def load(
    name: str, path: str | Path = "", *, dtype: str = "float32", seed: int = 0
) -> tuple[PerceptualConfig, Any]:
    """A network that sees, for ``perceptual.distance``.

    Args:
      name: "squeezenet", trained on ImageNet and packaged here; "random", the same network with
        random parameters; "vgg16", LPIPS, the distance that published tokenizers were trained with.
      path: torchvision's ``vgg16-*.pth``, for "vgg16".
      dtype: of its convolutions, "float32" or "bfloat16".
      seed: of "random".

    Returns:
      The config, and the parameters: a nested dict of float32 NumPy arrays.

    Raises:
      UserError: the name is unknown, or the file is missing or another one.
    """
    if name not in NAMES:
        raise UserError(f"perceptual network {name!r}: must be one of {', '.join(NAMES)}")
    if (name == "vgg16") != bool(path):
        raise UserError(
            "the perceptual network vgg16 needs the path of torchvision's vgg16-*.pth; the others "
            "need no file"
        )
    config = PerceptualConfig("vgg16" if name == "vgg16" else "squeezenet", dtype)
    if name == "random":
        params = jax.jit(perceptual.init_params, static_argnums=0)(config, jax.random.key(seed))
        return config, jax.tree.map(np.asarray, params)
    found = _vgg16(path) if name == "vgg16" else {}
    file = "squeezenet" if name == "squeezenet" else "lpips_vgg16"
    with importlib.resources.as_file(_assets() / f"{file}.safetensors") as packaged:
        found |= tensors.read_safetensors(packaged)
        return config, folder.fit(found, perceptual.abstract_params(config), path or packaged)


def _assets() -> Any:
    return importlib.resources.files("vqd_jax.interop") / "assets"


def _vgg16(path: str | Path) -> dict[str, np.ndarray]:
    loaded = torch_file.load(path)
    found = {}
    for index, place in enumerate(_VGG_CONVOLUTIONS):
        for kind, ours in (("weight", "kernel"), ("bias", "bias")):
            theirs = f"features.{place}.{kind}"
            if not isinstance(loaded, Mapping) or theirs not in loaded:
                raise UserError(f"{path} is not torchvision's VGG16: it lacks {theirs}")
            array = np.asarray(loaded[theirs])
            # [out, in, k, k] -> [k, k, in, out]
            found[f"conv.{index}.{ours}"] = array.T.swapaxes(0, 1) if array.ndim == 4 else array
    return found
