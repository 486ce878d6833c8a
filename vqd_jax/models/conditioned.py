"""The denoiser with the encoder of its condition: p0(codes | noisy tokens, time, condition).

A condition is a text (ids), a class (a label) or nothing (None); the denoiser's config says which.

Letters: B batch, N image tokens, L text positions, K codes.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from vqd_jax.models import functional
from vqd_jax.models.attention import ONE_DEVICE, Placement
from vqd_jax.models.denoiser import Denoiser, DenoiserConfig, TextContext
from vqd_jax.models.text_encoder import TextEncoder, TextEncoderConfig


@dataclasses.dataclass(frozen=True)
class ConditionedDenoiserConfig:
    """Sizes of the two networks.

    Attributes:
      text_encoder: None if the condition is no text.
      denoiser: sizes of the denoiser.
      freeze_text_encoder: no gradient reaches the text encoder, because it is pretrained.
    """

    text_encoder: TextEncoderConfig | None
    denoiser: DenoiserConfig
    freeze_text_encoder: bool = False

    def __post_init__(self):
        if (self.text_encoder is not None) != (self.denoiser.condition == "text"):
            raise ValueError(
                f"denoiser.condition={self.denoiser.condition!r}: a text needs a text encoder, and "
                "no other condition has one"
            )
        if self.text_encoder and self.text_encoder.width != self.denoiser.text_width:
            raise ValueError(
                f"text_encoder.width={self.text_encoder.width} is not "
                f"denoiser.text_width={self.denoiser.text_width}"
            )


class ConditionedDenoiser(nnx.Module):
    """The two networks.

    The null condition of guidance is the empty caption. If the null text is learned, its features
    are a parameter instead of an output of the text encoder (Improved VQ-Diffusion, section 3.1).

    Args:
      config: sizes.
      rngs: with a ``params`` stream.
      placement: of the activations on several devices.
    """

    def __init__(
        self,
        config: ConditionedDenoiserConfig,
        *,
        rngs: nnx.Rngs,
        placement: Placement = ONE_DEVICE,
    ):
        self.config = config
        text = config.text_encoder
        if text is not None:
            self.text_encoder = TextEncoder(text, rngs=rngs, placement=placement)
        self.denoiser = Denoiser(config.denoiser, rngs=rngs, placement=placement)
        if text is not None and config.denoiser.learned_null:
            shape = (text.context_length, text.width)
            self.null_text = nnx.Param(jax.random.normal(rngs.params(), shape))

    def text_features(self, text_ids: jax.Array, encoded: jax.Array | None = None) -> jax.Array:
        """Ids int32 [B, L] -> features [B, L, text_width]; an empty caption has the learned ones.

        ``encoded`` is the output of the text encoder, if it is known already.
        """
        features = self.text_encoder(text_ids) if encoded is None else encoded
        if self.config.freeze_text_encoder:
            features = jax.lax.stop_gradient(features)
        if not self.config.denoiser.learned_null:
            return features
        # An empty caption has its end token, which is the last id, right after its start token.
        empty = text_ids[:, 1] == self.config.text_encoder.vocab_size - 1
        null = self.null_text[...].astype(features.dtype)[None]
        return jnp.where(empty[:, None, None], null, features)

    def context(
        self, condition: jax.Array | None, encoded: jax.Array | None = None
    ) -> TextContext | jax.Array | None:
        """All that sampling needs of the condition; it is computed once.

        Args:
          condition: text ids int32 [B, L], labels int32 [B], or None.
          encoded: see ``text_features``.
        """
        if self.config.text_encoder is not None:
            condition = self.text_features(condition, encoded)
        return self.denoiser.context(condition)

    def predictor(
        self, condition: jax.Array | None, encoded: jax.Array | None = None
    ) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """(tokens int32 [B, N] in 0..K, times int32 [B] in 1..T) -> logits float32 [B, N, K].

        Args:
          condition, encoded: as for ``context``.
        """
        context = self.context(condition, encoded)

        def predict(tokens, time):
            return self.denoiser.denoise(tokens, self.denoiser.modulations(time), context)

        return predict

    def log_x0(self, tokens: jax.Array, time: jax.Array, condition: jax.Array | None) -> jax.Array:
        """Normalised log p0, float32 [B, N, K]; arguments as for ``predictor``."""
        return jax.nn.log_softmax(self.predictor(condition)(tokens, time))


init_params = functools.partial(functional.init, ConditionedDenoiser)
abstract_params = functools.partial(functional.abstract, ConditionedDenoiser)
bind = functools.partial(functional.bind, ConditionedDenoiser)
