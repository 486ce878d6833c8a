"""CLIP: a text and an image encoder whose features are alike where text and image match.

The image tower is a vision transformer: the patches of an image and one class token go through
pre-norm blocks, and the class token's state is the feature (Radford et al., arXiv:2103.00020).

Letters: B batch, L text positions, S image side, P patch side, D width, E shared width.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from vqd_jax.errors import require_divisible
from vqd_jax.models import attention, functional
from vqd_jax.models.text_encoder import EncoderBlock, TextEncoder, TextEncoderConfig

# Of the pixels that CLIP was trained on, scaled to 0..1: red, green, blue.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ImageEncoderConfig:
    """Sizes of an image encoder.

    Attributes:
      image_size: S, in pixels.
      patch_size: P, in pixels.
      width, num_layers, num_heads: D, number of blocks, number of heads.
      dtype: compute dtype, "float32" or "bfloat16".
      product_dtype: what the inputs of products with weights are rounded to; see ``linear``.
    """

    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    dtype: str = "float32"
    product_dtype: str = "float32"

    def __post_init__(self):
        require_divisible(self, "image_encoder.", width="num_heads", image_size="patch_size")


class ImageEncoder(nnx.Module):
    """Images uint8 [B, S, S, 3] -> features [B, D]."""

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
        """The class token after the last norm, for images from ``resize_and_crop``."""
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
    """The centre square of an image as in CLIP's training: bicubic, the short side becomes S.

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


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of the two towers, and E, the width of the space that both project to."""

    text: TextEncoderConfig
    image: ImageEncoderConfig
    embedding_width: int


# Published sizes. VQ-Diffusion uses the text tower, the CLIP score both.
VIT_B_32 = ClipConfig(
    TextEncoderConfig(49408, 77, 512, 12, 8), ImageEncoderConfig(224, 32, 768, 12, 12), 512
)
VIT_L_14 = ClipConfig(
    TextEncoderConfig(49408, 77, 768, 12, 12), ImageEncoderConfig(224, 14, 1024, 24, 16), 768
)


class Clip(nnx.Module):
    """Texts and images -> points on the unit sphere of the shared space."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        width, normal = config.embedding_width, nnx.initializers.normal

        def projection(size):
            return nnx.Param(normal(size**-0.5)(rngs.params(), (size, width)))

        self.text = TextEncoder(config.text, rngs=rngs)
        self.image = ImageEncoder(config.image, rngs=rngs)
        self.text_projection = projection(config.text.width)
        self.image_projection = projection(config.image.width)
        # Its exp multiplies the similarities before the softmax of the training loss.
        self.logit_scale = nnx.Param(jnp.log(1 / 0.07))

    def embed_text(self, ids: jax.Array) -> jax.Array:
        """Token ids int32 [B, L] -> float32 [B, E] of length 1.

        The feature is that of the end token, which has the largest id of the vocabulary.
        """
        states = self.text(ids)
        end = jnp.argmax(ids, axis=1)
        pooled = jnp.take_along_axis(states, end[:, None, None], axis=1)[:, 0]
        return _unit(pooled @ self.text_projection[...].astype(pooled.dtype))

    def embed_images(self, images: jax.Array) -> jax.Array:
        """Images uint8 [B, S, S, 3] from ``resize_and_crop`` -> float32 [B, E] of length 1."""
        pooled = self.image(images)
        return _unit(pooled @ self.image_projection[...].astype(pooled.dtype))


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


abstract_params = functools.partial(functional.abstract, Clip)
bind = functools.partial(functional.bind, Clip)
