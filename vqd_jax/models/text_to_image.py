"""Text encoder and denoiser as one model: p0(codes | noisy tokens, time, text).

Letters: B batch, N image tokens, L text positions, K codes.
"""

import dataclasses
import functools

import jax
from flax import nnx

from vqd_jax.models.denoiser import Denoiser, DenoiserConfig, TextContext
from vqd_jax.models.text_encoder import TextEncoder, TextEncoderConfig


@dataclasses.dataclass(frozen=True)
class TextToImageConfig:
    """Sizes of the two networks."""

    text_encoder: TextEncoderConfig
    denoiser: DenoiserConfig

    def __post_init__(self):
        if self.text_encoder.width != self.denoiser.text_width:
            raise ValueError(
                f"text_encoder.width={self.text_encoder.width} is not "
                f"denoiser.text_width={self.denoiser.text_width}"
            )


class TextToImage(nnx.Module):
    """The two networks; the null condition is the text feature of the empty caption."""

    def __init__(self, config: TextToImageConfig, *, rngs: nnx.Rngs):
        self.text_encoder = TextEncoder(config.text_encoder, rngs=rngs)
        self.denoiser = Denoiser(config.denoiser, rngs=rngs)

    def log_x0(self, tokens: jax.Array, time: jax.Array, text_ids: jax.Array) -> jax.Array:
        """log p0, float32 [B, N, K], normalised; tokens [B, N], time [B], text_ids [B, L]."""
        return jax.nn.log_softmax(self.denoiser(tokens, time, self.text_encoder(text_ids)))

    def text_context(self, text_ids: jax.Array) -> TextContext:
        """All that sampling needs of the text, computed once; text_ids int32 [B, L]."""
        return self.denoiser.text_context(self.text_encoder(text_ids))


def init_params(config: TextToImageConfig, key: jax.Array):
    """Initial parameters: a nested dict of float32 arrays."""
    model = TextToImage(config, rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@functools.lru_cache(maxsize=8)
def _graphdef(config: TextToImageConfig):
    return nnx.graphdef(nnx.eval_shape(lambda: TextToImage(config, rngs=nnx.Rngs(0))))


def bind(config: TextToImageConfig, params) -> TextToImage:
    """The model with the parameters of ``init_params``; usable inside ``jit``."""
    return nnx.merge(_graphdef(config), params)
