"""From a sentence to pictures: tokenizer, text encoder, sampler, denoiser, autoencoder.

Letters: P prompts, J images a prompt, B batch, N image tokens, L text tokens, S image side,
F sampling steps.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax.data.text import ClipTokenizer
from vqd_jax.diffusion import sampler
from vqd_jax.errors import UserError
from vqd_jax.models import autoencoder, text_to_image
from vqd_jax.training import checkpoint, stage_one
from vqd_jax.training.state import create_state


class Generation(NamedTuple):
    """What ``VQDiffusion.generate`` returns.

    Attributes:
      images: uint8 [P, J, S, S, 3].
      codes: int32 [P, J, N].
      trajectory: int32 [F, P, J, N], tokens after every step (K is the mask token), or None.
    """

    images: np.ndarray
    codes: np.ndarray
    trajectory: np.ndarray | None


class VQDiffusion:
    """A trained model, ready to sample.

    Args:
      config: the config it was trained with.
      params: of ``text_to_image``, usually the averaged ones.
      autoencoder_params: of ``models.autoencoder``, codebook included.
    """

    def __init__(self, config: ConfigDict, params: Any, autoencoder_params: Any):
        self.config = config
        self.tokenizer = ClipTokenizer(config.text_encoder.context_length)
        self._params = params
        self._autoencoder_params = autoencoder_params
        self._sample = jax.jit(
            functools.partial(
                _sample,
                model_config=config_lib.model_config(config),
                schedule=config_lib.noise_schedule(config),
            )
        )
        sizes = config_lib.autoencoder_config(config)
        self._encode = jax.jit(functools.partial(_encode, config=sizes))
        self._decode = jax.jit(functools.partial(_decode, config=sizes))

    @classmethod
    def from_workdir(cls, workdir: str) -> "VQDiffusion":
        """The newest checkpoint of a training run, with averaged parameters.

        Raises:
          UserError: nothing was trained there, or it cannot be read.
        """
        path = Path(workdir)
        if not (path / "config.json").exists():
            raise UserError(f"{path} has no config.json: nothing was trained there")
        config = config_lib.load(str(path / "config.json"))
        if not Path(stage_one.model_folder(workdir)).exists():
            raise UserError(f"stage one of {path} is not finished; run the training command again")
        autoencoder_params = stage_one.load(config, stage_one.model_folder(workdir))
        abstract = checkpoint.abstract(jax.eval_shape(functools.partial(create_state, config)))
        _, state = checkpoint.load(str(path / "checkpoints"), abstract)
        return cls(config, state.ema_params, autoencoder_params)

    def with_params(self, params: Any) -> "VQDiffusion":
        """The same model with other parameters; compiled functions are shared."""
        other = object.__new__(VQDiffusion)
        other.__dict__.update(self.__dict__, _params=params)
        return other

    def generate(
        self,
        prompts: Sequence[str],
        *,
        num_images: int = 1,
        seed: int = 0,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        truncation: float | None = None,
        trajectory: bool = False,
        batch_size: int = 16,
    ) -> Generation:
        """Pictures of every prompt; image j of prompt i depends on (seed, i, j) and the prompt.

        Args:
          prompts: P texts; an empty one is unconditional. Too long ones are cut with a warning.
          num_images: J.
          seed: 0..2**32-1.
          num_steps: network calls, 1..T, or 0 for T; None takes the config's.
          guidance_scale: 1 is no guidance; None takes the config's.
          truncation: share of probability that is kept, 1 is all; None takes the config's.
          trajectory: return the tokens after every step too.
          batch_size: images in one call of the network.
        """
        defaults = self.config.sampling
        scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        rate = defaults.truncation if truncation is None else truncation
        steps = defaults.num_steps if num_steps is None else num_steps
        total = self.config.diffusion.num_steps
        _require(len(prompts) > 0, "generate needs at least one prompt")
        _require(num_images >= 1, f"num_images={num_images}: must be at least 1")
        _require(0 <= seed < 2**32, f"seed={seed}: must lie in 0..2**32-1")
        _require(0 <= steps <= total, f"num_steps={steps}: must lie in 0..{total}; 0 is {total}")
        _require(0 <= scale < math.inf, f"guidance_scale={scale}: must be finite, at least 0")
        _require(rate > 0, f"truncation={rate}: must be positive")
        settings = sampler.Settings(
            num_steps=steps,
            guidance=None if scale == 1 else jnp.float32(scale),
            truncation=None if rate >= 1 else jnp.float32(rate),
            trajectory=trajectory,
        )
        ids = self.tokenizer.encode_batch(list(prompts)).repeat(num_images, axis=0)
        null_ids = self.tokenizer.encode_batch([""])
        pairs = [(i, j) for i in range(len(prompts)) for j in range(num_images)]
        keys = _image_keys(seed, np.array(pairs, np.uint32))

        # Batches of about equal size: 20 images are two tens, not sixteen and four.
        batch_size = math.ceil(len(pairs) / math.ceil(len(pairs) / batch_size))
        images, codes, tokens = [], [], []
        for start in range(0, len(pairs), batch_size):
            # The last batch overlaps the one before, so that there is one shape.
            rows = slice(min(start, len(pairs) - batch_size), None)
            new = start - rows.start
            take = slice(rows.start, rows.start + batch_size)
            sample = self._sample(self._params, keys[take], ids[take], null_ids, settings)
            images.append(np.asarray(self.decode(sample.codes))[new:])
            codes.append(np.asarray(sample.codes)[new:])
            if trajectory:
                tokens.append(np.asarray(sample.trajectory)[:, new:])
        shape = (len(prompts), num_images)
        unflatten = lambda x: x.reshape(*shape, *x.shape[1:])  # noqa: E731
        if trajectory:
            tokens = np.concatenate(tokens, axis=1)
            tokens = tokens.reshape(tokens.shape[0], *shape, tokens.shape[-1])
        return Generation(
            unflatten(np.concatenate(images)),
            unflatten(np.concatenate(codes)),
            tokens if trajectory else None,
        )

    def reconstruct(self, images: np.ndarray, batch_size: int = 32) -> np.ndarray:
        """Pictures through their codes and back: uint8 [R, S, S, 3] -> the same shape."""
        made = []
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            padded = np.concatenate([part, part[:1].repeat(batch_size - len(part), axis=0)])
            codes = self._encode(self._autoencoder_params, padded)
            made.append(np.asarray(self.decode(codes))[: len(part)])
        return np.concatenate(made)

    def decode(self, codes: jax.Array) -> jax.Array:
        """uint8 [B, S, S, 3] of codes int32 [B, N]."""
        return self._decode(self._autoencoder_params, codes)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@jax.jit
def _image_keys(seed, pairs):
    """One key an image: a function of (seed, i, j)."""
    root = jax.random.fold_in(jax.random.key(seed), 2)
    fold = lambda pair: jax.random.fold_in(  # noqa: E731
        jax.random.fold_in(root, pair[0]), pair[1]
    )
    return jax.vmap(fold)(pairs)


def _sample(params, keys, text_ids, null_ids, settings, *, model_config, schedule):
    model = text_to_image.bind(model_config, params)
    batch, grid = keys.shape[0], model_config.denoiser.grid
    if settings.guidance is not None:
        null_ids = jnp.broadcast_to(null_ids, text_ids.shape)
        text_ids = jnp.concatenate([text_ids, null_ids])
    # What does not depend on the tokens is computed once, before the scan over steps.
    context = model.context(text_ids)
    modulations = model.denoiser.modulations(jnp.arange(1, schedule.num_steps + 1))

    def predict_log_x0(tokens, time):
        return jax.nn.log_softmax(model.denoiser.denoise(tokens, modulations[:, time - 1], context))

    shape = (batch, grid[0] * grid[1])
    return sampler.sample(keys, predict_log_x0, shape, schedule, settings)


def _encode(params, images, *, config):
    return autoencoder.bind(config, params).codes(autoencoder.from_pixels(images))


def _decode(params, codes, *, config):
    return autoencoder.to_pixels(autoencoder.bind(config, params).decode(codes))
