"""The adversarial part of stage one: losses of the discriminator and of the autoencoder.

All are pure functions of logits float32 [B, h, w, 1], as ``models.discriminator`` makes them.

Letters: B batch, h/w side of the grid of logits.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


def discriminator_hinge(real: jax.Array, fake: jax.Array) -> jax.Array:
    """The discriminator's hinge loss (Lim and Ye, "Geometric GAN", 2017), float32 scalar.

        1/2 E[max(0, 1 - D(x))] + 1/2 E[max(0, 1 + D(reconstruction))]

    Args:
      real: logits of pictures.
      fake: logits of reconstructions.
    """
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))


def generator_hinge(fake: jax.Array) -> jax.Array:
    """The autoencoder's side of the hinge loss, -E[D(reconstruction)]; float32 scalar."""
    return -jnp.mean(fake)


@flax.struct.dataclass
class LecamState:
    """Moving averages of the discriminator's mean logit.

    Attributes:
        real: float32 scalar, of pictures.
        fake: float32 scalar, of reconstructions.
    """

    real: jax.Array
    fake: jax.Array


def init_lecam() -> LecamState:
    """The averages before the first step: zeros."""
    return LecamState(jnp.zeros(()), jnp.zeros(()))


def lecam(state: LecamState, real: jax.Array, fake: jax.Array) -> jax.Array:
    """LeCam regularisation of the discriminator; float32 scalar.

        E[max(0, D(x) - fake average)^2] + E[max(0, real average - D(reconstruction))^2]

    (Tseng et al., "Regularizing Generative Adversarial Networks under Limited Data", CVPR 2021.) It
    draws the two kinds of logits to each other, so that a discriminator cannot win by far. No
    gradient flows into the averages.

    Args:
      state: averages, from before this step.
      real: logits of pictures.
      fake: logits of reconstructions.
    """
    state = jax.lax.stop_gradient(state)
    above = jnp.mean(jax.nn.relu(real - state.fake) ** 2)
    return above + jnp.mean(jax.nn.relu(state.real - fake) ** 2)


def update_lecam(
    state: LecamState, real: jax.Array, fake: jax.Array, decay: float = 0.999
) -> LecamState:
    """The averages after this step: average <- decay average + (1 - decay) mean logit."""

    def moved(average, logits):
        return decay * average + (1.0 - decay) * jax.lax.stop_gradient(jnp.mean(logits))

    return LecamState(moved(state.real, real), moved(state.fake, fake))


def adaptive_weight(reconstruction: Any, adversarial: Any, limit: float = 1e4) -> jax.Array:
    """The published weight of the autoencoder's adversarial loss (Esser et al., 2021, eq. 7).

        |gradient of the reconstruction loss| / (|gradient of the adversarial loss| + 1e-4)

    Args:
      reconstruction: gradient of the reconstruction loss, which has the perceptual loss in it, by
        the kernel of the decoder's last convolution; an array or a tree of them.
      adversarial: gradient of ``generator_hinge`` by the same.
      limit: the weight is at most this.

    Returns:
      float32 scalar, without a gradient.
    """
    ratio = optax.tree.norm(reconstruction) / (optax.tree.norm(adversarial) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, limit))


def adversarial_share(step: jax.Array, start: int, warmup: int = 0) -> jax.Array:
    """How much of the adversarial loss counts at a step; float32 scalar in 0..1.

    Args:
      step: int32 scalar, the steps taken before this one.
      start: it is 0 before this step.
      warmup: steps from 0 to 1, linearly; 0 is none, as published.
    """
    return jnp.clip((step - start + 1) / (warmup + 1), 0.0, 1.0).astype(jnp.float32)
