"""The networks of one model, compiled, on one device or on a mesh: rows of arrays in and out.

Letters: B rows, N image tokens, L text tokens, D text width, K codes, S image side.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax import generation
from vqd_jax.diffusion import sampler
from vqd_jax.models import autoencoder, linear
from vqd_jax.models.attention import ONE_DEVICE
from vqd_jax.parallel import rows, sharding
from vqd_jax.request import Rows, require


class Networks:
    """Compiled functions of parameters. A function is compiled for few numbers of rows.

    Args:
      config: of the model.
      params: of ``models.conditioned``.
      autoencoder_params: of ``models.autoencoder``, codebook included.
      mesh: devices to use, where the parameters are already; None is one.
      autoencoder_dtype: that the decoder computes in.

    Attributes:
      sizes: of the text encoder and the denoiser.
      schedule: the noise schedule.
    """

    def __init__(
        self,
        config: ConfigDict,
        params: Any,
        autoencoder_params: Any,
        mesh: Mesh | None,
        autoencoder_dtype: str = "float32",
    ):
        self.params, self.autoencoder_params, self.mesh = params, autoencoder_params, mesh
        self.sizes, self.schedule = (
            config_lib.model_config(config),
            config_lib.noise_schedule(config),
        )
        self.num_codes = self.sizes.denoiser.num_codes
        self.num_tokens = int(np.prod(self.sizes.denoiser.grid))
        codec = config_lib.autoencoder_config(config)
        place = ONE_DEVICE if mesh is None else sharding.placement(mesh)
        of_chain = {"model_config": self.sizes, "schedule": self.schedule, "placement": place}
        self.sample = _compiled(generation.draw, **of_chain)
        self.begin = _compiled(generation.begin, **of_chain)
        self.advance = _compiled(generation.advance, **of_chain)
        self.bits = _compiled(generation.bits, names="num_draws", **of_chain)
        self.encode = _compiled(autoencoder.encode, config=codec)
        self.decode = _compiled(autoencoder.decode, config=codec, dtype=autoencoder_dtype)
        self._text = _compiled(generation.text_features, config=self.sizes, placement=place)
        self._log_x0 = _compiled(generation.log_p0, config=self.sizes, placement=place)

    def with_params(self, params: Any) -> "Networks":
        """The same with other parameters; compiled functions are shared."""
        other = object.__new__(Networks)
        other.__dict__.update(self.__dict__, params=params)
        return other

    def described(self) -> str:
        """The sizes, and whether products are rounded here: "auto" does not say so."""
        product_dtype = self.sizes.denoiser.product_dtype
        sizes = str(self.sizes).replace(f", product_dtype={product_dtype!r}", "")
        devices = jax.devices() if self.mesh is None else self.mesh.devices.flat
        rounded = linear.rounds(product_dtype, devices[0].platform)
        return sizes + ", rounded products" * rounded

    def draw(
        self,
        wanted: Rows,
        settings: sampler.Settings,
        batch_size: int,
        callback: generation.Callback | None = None,
        callback_steps: int = 1,
    ) -> sampler.Sample:
        """A picture for each row, as NumPy arrays; arguments as for ``VQDiffusion.generate``."""
        require(batch_size >= 1, f"batch_size={batch_size}: must be at least 1")
        require(callback_steps >= 1, f"callback_steps={callback_steps}: must be at least 1")
        made = []
        for part, numbers in self._batches(wanted, batch_size):
            keys = generation.image_keys(part.seeds, part.pairs)
            inputs = (self.params, *map(self._put, (keys, part.conditions, part.nulls)))
            here = settings.replace(known=self._put(part.known), initial=self._put(part.initial))
            if callback is None:
                drawn = self.sample(*inputs, here)
            else:
                watch = (callback, numbers, len(wanted.pairs), self.num_codes, self.pixels)
                tell = functools.partial(generation.tell, *watch)
                programs = (self.begin, self.advance)
                drawn = generation.in_segments(*programs, inputs, here, callback_steps, tell)
            new = len(numbers)
            made.append(jax.tree.map(lambda x, new=new: np.asarray(x)[..., :new, :], drawn))
        return jax.tree.map(lambda *parts: np.concatenate(parts, axis=-2), *made)

    def codes(self, squares: np.ndarray, batch_size: int = 16) -> np.ndarray:
        """Codes int32 [B, N] of pictures uint8 [B, S, S, 3]."""
        return self._run(self.encode, self.autoencoder_params, squares, batch_size)

    def pixels(self, codes: np.ndarray, batch_size: int = 16) -> np.ndarray:
        """Pictures uint8 [B, S, S, 3] of codes int32 [B, N]."""
        return self._run(self.decode, self.autoencoder_params, codes, batch_size)

    def likelihood(
        self, codes: np.ndarray, conditions: np.ndarray, key, num_draws: int, batch_size: int
    ) -> np.ndarray:
        """Bits a token, float32 [B], of codes [B, N]; see ``generation.bits``."""

        def bits(params, part):
            return self.bits(params, key, *part, num_draws=num_draws)

        return self._run(bits, self.params, (codes, conditions), batch_size)

    def text_features(self, ids: np.ndarray) -> jax.Array:
        """Features float32 [B, L, D] of text ids int32 [B, L]."""
        return self._text(self.params, ids)

    def log_x0(self, codes, condition, time) -> jax.Array:
        """log p0 float32 [B, N, K]; see ``VQDiffusion.predict_log_x0``."""
        return self._log_x0(self.params, jnp.asarray(codes), condition, jnp.asarray(time))

    def _batches(self, tree, batch_size):
        shards = 1 if self.mesh is None else sharding.num_row_shards(self.mesh)
        return rows.few_shapes(tree, batch_size, shards)

    def _run(self, function, params, tree, batch_size) -> np.ndarray:
        found = [
            np.asarray(function(params, jax.tree.map(self._put, part)))[: len(numbers)]
            for part, numbers in self._batches(tree, batch_size)
        ]
        return np.concatenate(found)

    def _put(self, array):
        """An array [B, ...] with its rows spread over the devices of the mesh, if there is one."""
        if self.mesh is None or array is None:
            return array
        whole = array.shape[0] % sharding.num_row_shards(self.mesh)
        place = sharding.replicated if whole else sharding.batch_sharding
        return jax.device_put(array, place(self.mesh))


def _compiled(function: Callable, names: str | None = None, **static: Any) -> Callable:
    return jax.jit(functools.partial(function, **static), static_argnames=names)
