"""Image encoder of the shape of CLIP's image tower: a picture -> one feature.

A vision transformer: the picture's patches and one class token go through pre-norm blocks, and the
class token is what comes out (Radford et al., arXiv:2103.00020).

Letters: B batch, S image side, P patch side, D width.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from vqd_jax.models import attention
from vqd_jax.models.text_encoder import EncoderBlock

# Of the pixels that CLIP was trained on, in 0..1, for red, green and blue.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ImageEncoderConfig:
    """Sizes of an image encoder.

    Attributes:
      image_size: S, in pixels.
      patch_size: P, in pixels.
      width, num_layers, num_heads: D, blocks, heads.
      dtype: compute dtype, "float32" or "bfloat16".
    """

    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    dtype: str = "float32"

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(
                f"image_encoder.width={self.width} is not divisible by "
                f"image_encoder.num_heads={self.num_heads}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_encoder.image_size={self.image_size} is not divisible by "
                f"image_encoder.patch_size={self.patch_size}"
            )


class ImageEncoder(nnx.Module):
    """uint8 pictures [B, S, S, 3] -> features [B, D]."""

    def __init__(self, config: ImageEncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.width, attention.float_dtype(config.dtype)
        normal = nnx.initializers.normal(width**-0.5)
        side = (config.patch_size, config.patch_size)
        positions = (config.image_size // config.patch_size) ** 2 + 1
        self.patch_embedding = nnx.Conv(
            3, width, side, side, padding="VALID", use_bias=False, dtype=dtype, rngs=rngs
        )
        self.class_embedding = nnx.Param(normal(rngs.params(), (width,)))
        self.position_embedding = nnx.Param(normal(rngs.params(), (positions, width)))
        self.norm_in = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.blocks = attention.stack_layers(
            lambda rngs: EncoderBlock(config, causal=False, rngs=rngs), config.num_layers, rngs
        )
        self.norm_out = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The class token after the last norm; images as ``resize_and_crop`` makes them."""
        size, width = self.config.image_size, self.config.width
        chex.assert_shape(images, (None, size, size, 3))
        chex.assert_type(images, jnp.uint8)
        h = self.patch_embedding(_standardise(images)).reshape(images.shape[0], -1, width)
        first = jnp.broadcast_to(self.class_embedding[...].astype(h.dtype), (len(h), 1, width))
        h = jnp.concatenate([first, h], axis=1)
        h = self.norm_in(h + self.position_embedding[...].astype(h.dtype)[None])
        h = attention.scan_layers(self.blocks, h, None)
        return self.norm_out(h[:, 0])


def _standardise(images: jax.Array) -> jax.Array:
    mean, std = (np.array(c, np.float32)[None, None, None] for c in (PIXEL_MEAN, PIXEL_STD))
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def resize_and_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The centre square of a picture, as CLIP was trained on: the short side resized, bicubic.

    Args:
      image: uint8 [H, W, 3], of any size.
      size: S.

    Returns:
      uint8 [S, S, 3].
    """
    chex.assert_shape(image, (None, None, 3))
    height, width = image.shape[:2]
    short = min(height, width)
    resized = (size * width // short, size * height // short)
    picture = Image.fromarray(np.asarray(image, np.uint8))
    if resized != picture.size:
        picture = picture.resize(resized, Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in resized)
    return np.asarray(picture.crop((left, top, left + size, top + size)))
