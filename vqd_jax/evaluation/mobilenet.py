"""MobileNetV2 (Sandler et al., CVPR 2018, arXiv:1801.04381) without its classes, from its file.

Batch normalisation is part of the convolutions here: its averages are constants.

Letters: B batch, S image side in pixels, C channels, D = 1280 features.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqd_jax.errors import UserError
from vqd_jax.interop import torch_file
from vqd_jax.models import convolution

WIDTH = 1280
_EPSILON = 1e-5
# (expansion, channels, blocks, stride of the first block)
_STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip
# (expands, stride, keeps its input) of every block
_BLOCKS = [
    (expansion > 1, 1 if index else stride, bool(index))
    for expansion, _, blocks, stride in _STAGES
    for index in range(blocks)
]
# Of ImageNet's pixels, scaled to 0..1.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load(path: str | Path) -> Any:
    """The parameters in a state dict with torchvision's names: a nested dict of NumPy arrays.

    Raises:
      UserError: the file is missing or of another network.
    """
    loaded = torch_file.load(path)

    def array(name):
        if not isinstance(loaded, Mapping) or name not in loaded:
            raise UserError(f"{path} is not MobileNetV2: it lacks {name}")
        return np.array(loaded[name], np.float32)

    def folded(convolution, norm):
        factor = array(f"{norm}.weight") / np.sqrt(array(f"{norm}.running_var") + _EPSILON)
        kernel = array(f"{convolution}.weight").transpose(2, 3, 1, 0) * factor
        return {
            "kernel": kernel,
            "bias": array(f"{norm}.bias") - array(f"{norm}.running_mean") * factor,
        }

    # torchvision nests a convolution and its norm; others write them one after the other.
    nested = isinstance(loaded, Mapping) and "features.1.conv.0.0.weight" in loaded

    def layers(block, expands):
        parts = ["expand", "depthwise", "project"][0 if expands else 1 :]
        for number, part in enumerate(parts):
            prefix = f"features.{block}.conv."
            if nested:
                last = part == "project"
                conv = f"{prefix}{number}" if last else f"{prefix}{number}.0"
                norm = f"{prefix}{number + 1}" if last else f"{prefix}{number}.1"
            else:
                conv, norm = f"{prefix}{3 * number}", f"{prefix}{3 * number + 1}"
            yield part, folded(conv, norm)

    last = len(_BLOCKS) + 1
    return {
        "stem": folded("features.0.0", "features.0.1"),
        "blocks": [dict(layers(n, expands)) for n, (expands, *_) in enumerate(_BLOCKS, 1)],
        "head": folded(f"features.{last}.0", f"features.{last}.1"),
    }


def _conv(params: Any, x: jax.Array, stride: int = 1) -> jax.Array:
    """A convolution, padded evenly; each channel apart if the kernel says so."""
    kernel = params["kernel"]
    pad = kernel.shape[0] // 2
    padding = ((pad, pad), (pad, pad))
    apart = kernel.shape[2] < x.shape[-1]
    conv = convolution.depthwise_conv if apart else convolution.conv
    return conv(x, kernel, stride=stride, padding=padding) + params["bias"][None, None, None]


_relu6 = functools.partial(jnp.clip, min=0.0, max=6.0)


def features(params: Any, pixels: jax.Array, *, size: int) -> jax.Array:
    """Pictures, uint8 [B, S, S, 3] -> features float32 [B, D].

    Args:
      params: of ``load``.
      pixels: of any side; they are resized bilinearly, with a filter where they shrink.
      size: side that the network sees.
    """
    x = pixels.astype(jnp.float32)
    if pixels.shape[1:3] != (size, size):
        x = jax.image.resize(x, (pixels.shape[0], size, size, 3), "linear")
    mean, std = (np.array(c, np.float32)[None, None, None] for c in (_MEAN, _STD))
    x = _relu6(_conv(params["stem"], (x / 255 - mean) / std, 2))
    for block, (_, stride, keeps) in zip(params["blocks"], _BLOCKS, strict=True):
        y = _relu6(_conv(block["expand"], x)) if "expand" in block else x
        y = _conv(block["project"], _relu6(_conv(block["depthwise"], y, stride)))
        x = x + y if keeps else y
    return jnp.mean(_relu6(_conv(params["head"], x)), axis=(1, 2))
