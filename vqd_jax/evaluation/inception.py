"""Inception-v3 as the Frechet inception distance has it: uint8 pictures -> 2,048 features.

It is the network of TensorFlow's graph of 2015-12-05, which differs from the published one (Szegedy
et al., arXiv:1512.00567) in its pooling: averages leave the padding out, and the last block takes
maxima where the others average. Batch norm is folded into the convolutions.

Letters: B batch, H, W height and width in pixels, C channels.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vqd_jax.errors import UserError
from vqd_jax.interop import torch_file

WIDTH = 2048
SIDE = 299
RESIZES = ("tensorflow", "pytorch")
_EPSILON = 1e-3

# conv(name, x, features, (height, width), stride, pad) -> relu(conv(x) + bias); ``pad`` is whether
# the output of stride 1 is as large as the input.
Convolution = Callable[..., jax.Array]


def load(path: str | Path) -> Any:
    """The parameters in pytorch-fid's or torch-fidelity's file: a nested dict of NumPy arrays.

    Raises:
      UserError: the file is missing, or of another network.
    """
    loaded = torch_file.load(path)

    def array(name, shape):
        if not isinstance(loaded, Mapping) or name not in loaded:
            raise UserError(f"{path} is not the Inception network of FID: it lacks {name}")
        found = np.array(loaded[name], np.float32)
        if found.shape != tuple(shape):
            raise UserError(f"{path}: {name} is {found.shape}, the network has {tuple(shape)}")
        return found

    params = {}
    for name, shapes in abstract_params().items():
        height, width, inputs, outputs = shapes["kernel"].shape
        kernel = array(f"{name}.conv.weight", (outputs, inputs, height, width))
        scale, bias, mean, variance = (
            array(f"{name}.bn.{part}", (outputs,))
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        factor = scale / np.sqrt(variance + _EPSILON)
        kernel = kernel.transpose(2, 3, 1, 0) * factor
        params[name] = {"kernel": kernel, "bias": bias - mean * factor}
    return params


def features(params: Any, pixels: jax.Array, *, resize: str = "tensorflow") -> jax.Array:
    """Features after the last pooling.

    Args:
      params: {layer: {"kernel": [h, w, C, C'], "bias": [C']}}; see ``abstract_params``.
      pixels: uint8 [B, H, W, 3].
      resize: "tensorflow", the resize inside TensorFlow's graph, which torch-fidelity has too; or
        "pytorch", that of pytorch-fid. Both are bilinear without antialiasing. The first aligns the
        corners of the first pixels, the second the corners of the pictures.

    Returns:
      float32 [B, 2048].
    """

    def conv(name, x, features, size=(1, 1), stride=1, pad=True):
        del features, size
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        height, width = kernel.shape[0] // 2, kernel.shape[1] // 2
        padding = ((height, height), (width, width)) if pad else "VALID"
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=dimensions
        )
        return jax.nn.relu(x + bias[None, None, None])

    if resize == "tensorflow":
        x = (resize_bilinear(pixels, SIDE, 0.0) - 128) / 128
    else:
        x = 2 * resize_bilinear(pixels.astype(jnp.float32) / 255, SIDE, 0.5) - 1
    return _network(conv, x)


@functools.cache
def abstract_params() -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """The shapes of ``params``, by the names of the layers in PyTorch's files."""
    found = {}

    def conv(name, x, features, size=(1, 1), stride=1, pad=True):
        found[name] = {
            "kernel": jax.ShapeDtypeStruct((*size, x.shape[-1], features), jnp.float32),
            "bias": jax.ShapeDtypeStruct((features,), jnp.float32),
        }
        short = [
            (side - (1 if pad else n)) // stride + 1
            for side, n in zip(x.shape[1:3], size, strict=True)
        ]
        return jnp.zeros((x.shape[0], *short, features), jnp.float32)

    jax.eval_shape(lambda x: _network(conv, x), jnp.zeros((1, SIDE, SIDE, 3)))
    return found


def resize_bilinear(images: jax.Array, size: int, offset: float) -> jax.Array:
    """Bilinear resize without antialiasing: [B, H, W, C] -> float32 [B, size, size, C].

    Output pixel i lies at (i + offset) H / size - offset of the input. ``offset`` is 0.0 in
    TensorFlow 1, and 0.5 in PyTorch.
    """
    x = images.astype(jnp.float32)
    for axis in (2, 1):
        length = x.shape[axis]
        place = np.arange(size, dtype=np.float32) + np.float32(offset)
        place = np.maximum(place * np.float32(length / size) - np.float32(offset), 0)
        low = np.minimum(place.astype(np.int32), length - 1)
        high = np.minimum(low + 1, length - 1)
        share = (place - low.astype(np.float32)).reshape([-1 if a == axis else 1 for a in range(4)])
        first, second = jnp.take(x, low, axis), jnp.take(x, high, axis)
        x = first + (second - first) * share
    return x


def _pool(x, combine, start, stride, pad):
    padding = ((0, 0), (1, 1), (1, 1), (0, 0)) if pad else "VALID"
    return lax.reduce_window(x, start, combine, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _max_pool(x, stride=2, pad=False):
    return _pool(x, lax.max, -jnp.inf, stride, pad)


def _average_pool(x):
    """The mean of 3 x 3 pixels, at the border of those that are there."""
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    return _pool(x, lax.add, 0.0, 1, True) / _pool(ones, lax.add, 0.0, 1, True)


def _network(conv: Convolution, x: jax.Array) -> jax.Array:
    x = conv("Conv2d_1a_3x3", x, 32, (3, 3), stride=2, pad=False)
    x = conv("Conv2d_2a_3x3", x, 32, (3, 3), pad=False)
    x = _max_pool(conv("Conv2d_2b_3x3", x, 64, (3, 3)))
    x = conv("Conv2d_3b_1x1", x, 80)
    x = _max_pool(conv("Conv2d_4a_3x3", x, 192, (3, 3), pad=False))
    for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        x = _block_a(functools.partial(_inside, conv, name), x, pooled)
    x = _block_b(functools.partial(_inside, conv, "Mixed_6a"), x)
    for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        x = _block_c(functools.partial(_inside, conv, name), x, width)
    x = _block_d(functools.partial(_inside, conv, "Mixed_7a"), x)
    x = _block_e(functools.partial(_inside, conv, "Mixed_7b"), x, _average_pool)
    largest = functools.partial(_max_pool, stride=1, pad=True)
    x = _block_e(functools.partial(_inside, conv, "Mixed_7c"), x, largest)
    return x.mean(axis=(1, 2))


def _inside(conv, block, name, *args, **kwargs):
    return conv(f"{block}.{name}", *args, **kwargs)


def _chain(conv, x, *layers):
    """Convolutions one after the other: (name, features, size, further arguments) of each."""
    for name, features, size, *rest in layers:
        x = conv(name, x, features, size, **(rest[0] if rest else {}))
    return x


_ONE, _THREE, _FIVE = (1, 1), (3, 3), (5, 5)
_SHRINK = {"stride": 2, "pad": False}


def _block_a(conv, x, pooled):
    double = _chain(
        conv, x, ("branch3x3dbl_1", 64, _ONE), ("branch3x3dbl_2", 96, _THREE),
        ("branch3x3dbl_3", 96, _THREE),
    )  # fmt: skip
    branches = [
        conv("branch1x1", x, 64),
        _chain(conv, x, ("branch5x5_1", 48, _ONE), ("branch5x5_2", 64, _FIVE)),
        double,
        conv("branch_pool", _average_pool(x), pooled),
    ]
    return jnp.concatenate(branches, axis=-1)


def _block_b(conv, x):
    double = _chain(
        conv, x, ("branch3x3dbl_1", 64, _ONE), ("branch3x3dbl_2", 96, _THREE),
        ("branch3x3dbl_3", 96, _THREE, _SHRINK),
    )  # fmt: skip
    branches = [conv("branch3x3", x, 384, _THREE, **_SHRINK), double, _max_pool(x)]
    return jnp.concatenate(branches, axis=-1)


def _block_c(conv, x, width):
    flat, tall = (1, 7), (7, 1)
    single = _chain(
        conv, x, ("branch7x7_1", width, _ONE), ("branch7x7_2", width, flat),
        ("branch7x7_3", 192, tall),
    )  # fmt: skip
    double = _chain(
        conv, x, ("branch7x7dbl_1", width, _ONE), ("branch7x7dbl_2", width, tall),
        ("branch7x7dbl_3", width, flat), ("branch7x7dbl_4", width, tall),
        ("branch7x7dbl_5", 192, flat),
    )  # fmt: skip
    pooled = conv("branch_pool", _average_pool(x), 192)
    return jnp.concatenate([conv("branch1x1", x, 192), single, double, pooled], axis=-1)


def _block_d(conv, x):
    seven = _chain(
        conv, x, ("branch7x7x3_1", 192, _ONE), ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, _THREE, _SHRINK),
    )  # fmt: skip
    three = _chain(conv, x, ("branch3x3_1", 192, _ONE), ("branch3x3_2", 320, _THREE, _SHRINK))
    return jnp.concatenate([three, seven, _max_pool(x)], axis=-1)


def _block_e(conv, x, pool):
    def split(name, x):
        return [conv(f"{name}a", x, 384, (1, 3)), conv(f"{name}b", x, 384, (3, 1))]

    three = split("branch3x3_2", conv("branch3x3_1", x, 384))
    double = split(
        "branch3x3dbl_3",
        _chain(conv, x, ("branch3x3dbl_1", 448, _ONE), ("branch3x3dbl_2", 384, _THREE)),
    )
    pooled = conv("branch_pool", pool(x), 192)
    return jnp.concatenate([conv("branch1x1", x, 320), *three, *double, pooled], axis=-1)
