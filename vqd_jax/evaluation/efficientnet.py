"""EfficientNet-Lite0 (Tan and Le, ICML 2019, in the form for small devices) from its PyTorch file.

Batch normalisation is part of the convolutions here: its averages are constants.

Letters: B batch, S image side in pixels, H/W side of a layer, C channels, D = 1280 features.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqd_jax.errors import UserError
from vqd_jax.interop import torch_file
from vqd_jax.models import convolution

WIDTH = 1280
_EPSILON = 1e-3


class _Stage(NamedTuple):
    """Equal blocks; the first has the stride. Its input is expanded before the depthwise part."""

    blocks: int
    side: int
    stride: int
    expansion: int
    channels: int


_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)
# (side, stride, expands, keeps its input) of every block
_BLOCKS = [
    (stage.side, 1 if index else stage.stride, stage.expansion > 1, bool(index))
    for stage in _STAGES
    for index in range(stage.blocks)
]


def load(path: str | Path) -> Any:
    """The parameters in a file ``efficientnet-lite0-*.pth``: a nested dict of NumPy arrays.

    Raises:
      UserError: the file is missing or of another network.
    """
    loaded = torch_file.load(path)

    def array(name):
        if not isinstance(loaded, Mapping) or name not in loaded:
            raise UserError(f"{path} is not EfficientNet-Lite0: it lacks {name}")
        return np.array(loaded[name], np.float32)

    def folded(convolution, norm):
        """Kernel [k, k, in, out] and bias of a convolution and the normalisation after it."""
        factor = array(f"{norm}.weight") / np.sqrt(array(f"{norm}.running_var") + _EPSILON)
        kernel = array(f"{convolution}.weight").transpose(2, 3, 1, 0) * factor
        bias = array(f"{norm}.bias") - array(f"{norm}.running_mean") * factor
        return {"kernel": kernel, "bias": bias}

    blocks = []
    for index, (*_, expands, _) in enumerate(_BLOCKS):
        name = f"_blocks.{index}"
        block = {
            "depthwise": folded(f"{name}._depthwise_conv", f"{name}._bn1"),
            "project": folded(f"{name}._project_conv", f"{name}._bn2"),
        }
        if expands:
            block["expand"] = folded(f"{name}._expand_conv", f"{name}._bn0")
        blocks.append(block)
    return {
        "stem": folded("_conv_stem", "_bn0"),
        "blocks": blocks,
        "head": folded("_conv_head", "_bn1"),
        "classifier": {"kernel": array("_fc.weight").T, "bias": array("_fc.bias")},
    }


def _conv(params: Any, x: jax.Array, stride: int = 1) -> jax.Array:
    """A convolution with TensorFlow's padding; each channel apart if the kernel says so."""
    kernel = params["kernel"]
    padding = convolution.same_padding(x.shape[1:3], kernel.shape[0], stride)
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
    batch = pixels.shape[0]
    x = pixels.astype(jnp.float32)
    if pixels.shape[1:3] != (size, size):
        x = jax.image.resize(x, (batch, size, size, 3), "linear")
    x = _relu6(_conv(params["stem"], (x - 127.0) / 128.0, 2))
    for block, (_, stride, _, keeps) in zip(params["blocks"], _BLOCKS, strict=True):
        y = _relu6(_conv(block["expand"], x)) if "expand" in block else x
        y = _conv(block["project"], _relu6(_conv(block["depthwise"], y, stride)))
        x = x + y if keeps else y
    return jnp.mean(_relu6(_conv(params["head"], x)), axis=(1, 2))


def logits(params: Any, found: jax.Array) -> jax.Array:
    """Features float32 [B, D] -> logits of the 1000 classes of ImageNet, float32 [B, 1000]."""
    return found @ params["classifier"]["kernel"] + params["classifier"]["bias"][None]
