"""CLIP: a text and an image encoder whose features of a matching pair point the same way.

Letters: B batch, L text positions, S image side, E width of the shared space.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vqd_jax.models.image_encoder import ImageEncoder, ImageEncoderConfig
from vqd_jax.models.text_encoder import TextEncoder, TextEncoderConfig


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of the two towers, and E, the width of the space that both are projected to."""

    text: TextEncoderConfig
    image: ImageEncoderConfig
    embedding_width: int


# The published sizes that VQ-Diffusion (text) and the CLIP score (both) use.
VIT_B_32 = ClipConfig(
    TextEncoderConfig(49408, 77, 512, 12, 8), ImageEncoderConfig(224, 32, 768, 12, 12), 512
)
VIT_L_14 = ClipConfig(
    TextEncoderConfig(49408, 77, 768, 12, 12), ImageEncoderConfig(224, 14, 1024, 24, 16), 768
)


class Clip(nnx.Module):
    """Texts and pictures -> points on the unit sphere of the shared space."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        width, normal = config.embedding_width, nnx.initializers.normal
        projection = lambda size: nnx.Param(  # noqa: E731
            normal(size**-0.5)(rngs.params(), (size, width))
        )
        self.text = TextEncoder(config.text, rngs=rngs)
        self.image = ImageEncoder(config.image, rngs=rngs)
        self.text_projection = projection(config.text.width)
        self.image_projection = projection(config.image.width)
        # exp of it is what similarities are multiplied by before the softmax of the training loss.
        self.logit_scale = nnx.Param(jnp.log(1 / 0.07))

    def embed_text(self, ids: jax.Array) -> jax.Array:
        """Token ids int32 [B, L] -> float32 [B, E] of length 1.

        The feature is that of the end token, whose id is the largest of the vocabulary.
        """
        states = self.text(ids)
        end = jnp.argmax(ids, axis=1)
        pooled = jnp.take_along_axis(states, end[:, None, None], axis=1)[:, 0]
        return _unit(pooled @ self.text_projection[...].astype(pooled.dtype))

    def embed_images(self, images: jax.Array) -> jax.Array:
        """Pictures uint8 [B, S, S, 3] from ``resize_and_crop`` -> float32 [B, E] of length 1."""
        pooled = self.image(images)
        return _unit(pooled @ self.image_projection[...].astype(pooled.dtype))


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@functools.lru_cache(maxsize=8)
def _split(config: ClipConfig) -> tuple[nnx.GraphDef, Any]:
    model = nnx.eval_shape(lambda: Clip(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def abstract_params(config: ClipConfig) -> Any:
    """Shapes of the parameters: a nested dict of ``jax.ShapeDtypeStruct``."""
    return _split(config)[1]


def bind(config: ClipConfig, params: Any) -> Clip:
    """The model with parameters like ``abstract_params``; usable inside ``jit``."""
    return nnx.merge(_split(config)[0], params)
