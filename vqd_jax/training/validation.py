"""What stage one measures on validation pictures while it trains.

Letters: R pictures, S image side in pixels.
"""

import functools
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax.data import batches, images, sets
from vqd_jax.data.bad_records import CheckedReader
from vqd_jax.evaluation import measures
from vqd_jax.models import autoencoder, perceptual
from vqd_jax.parallel import processes, rows, sharding
from vqd_jax.training import tokenizer
from vqd_jax.training.metrics import MetricWriter

# Pictures that are measured, and those of them that are shown.
COUNT, SHOWN = 64, 8


class Validation:
    """PSNR, SSIM, perceptual distance and use of the codes; and pictures beside their originals.

    Args:
      config: the resolved config.
      builder: the prepared data set.
      directory: of the pictures.
      mesh: the devices of all processes.
    """

    def __init__(self, config: ConfigDict, builder, directory: str, mesh: Mesh):
        self._config, self._builder, self._directory, self._mesh = config, builder, directory, mesh
        self._sizes = config_lib.autoencoder_config(config)
        self._options = config_lib.autoencoder_options(config)
        self._compiled = jax.jit(self._measure, out_shardings=sharding.replicated(mesh))

    @functools.cached_property
    def _crops(self) -> np.ndarray:
        """The first pictures of the split, uint8 [R, S, S, 3]."""
        split = sets.evaluation_split(self._builder)
        read = CheckedReader(batches.records(self._builder, split), 1.0, needs_captions=False)
        count = min(COUNT, self._builder.info.splits[split].num_examples)
        found = [r for r in map(read, range(count)) if r is not None]
        return np.stack([images.center_crop(r["image"], self._sizes.image_size) for r in found])

    def _measure(self, params, seen, pixels):
        params = sharding.gathering(self._mesh)(params)
        again, codes = tokenizer.reconstruct(params, pixels, config=self._sizes)
        made = {"images": again, "codes": codes}
        if seen is not None:
            both = autoencoder.from_pixels(again), autoencoder.from_pixels(pixels)
            made["perceptual"] = perceptual.distance(
                seen, *both, config=self._options.perceptual_config()
            )
        return made

    def run(
        self, step: int, params: Any, seen: Any, writer: MetricWriter, *, is_last: bool
    ) -> None:
        """Writes numbers and pictures; all processes take part.

        Args:
          step: steps taken.
          params: complete parameters, on the mesh.
          seen: those of the network of the perceptual distance, on the mesh; None measures none.
          writer: of the metrics.
          is_last: whether this is the last step.
        """
        shards = sharding.num_row_shards(self._mesh)
        size = rows.even_size(len(self._crops), self._options.batch_size, shards)
        parts = []
        for part, count in rows.batches(self._crops, size):
            made = self._compiled(params, seen, sharding.put_rows(part, self._mesh))
            parts.append(jax.tree.map(lambda x, n=count: np.asarray(x)[:n], made))
        made = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        counts = np.bincount(made["codes"].reshape(-1), minlength=self._sizes.num_codes)
        use = measures.code_use(counts)
        values = {"psnr": float(measures.psnr(self._crops, made["images"]).mean())}
        if self._sizes.image_size > measures.SSIM_WINDOW:
            values["ssim"] = float(measures.ssim(self._crops, made["images"]).mean())
        if seen is not None:
            values["perceptual"] = float(made["perceptual"].mean())
        values |= {"perplexity": use["code_perplexity"], "codes_used": use["codes_used"]}
        writer.write(step, {f"validation/{name}": value for name, value in values.items()})
        if processes.is_writer():
            self._show(step, values, made["images"], writer, is_last)

    def _show(self, step, values, made, writer, is_last) -> None:
        name = "reconstructions.png" if is_last else f"reconstructions/step_{step:07d}.png"
        path = f"{self._directory}/{name}"
        shown = np.stack([self._crops[:SHOWN], made[:SHOWN]])
        picture = images.grid(shown, ["pictures", "from their codes"])
        images.save(path, picture)
        writer.image(step, "reconstructions", np.asarray(picture))
        texts = {"ssim": "SSIM {:.3f}", "perceptual": "perceptual distance {:.4f}"}
        others = "".join(f", {text.format(values[n])}" for n, text in texts.items() if n in values)
        logging.info(
            "autoencoder: %.2f dB PSNR%s on %d validation pictures, which use %d of %d codes "
            "(perplexity %.0f); see %s",
            values["psnr"], others, len(self._crops), values["codes_used"],
            self._sizes.num_codes, values["perplexity"], path,
        )  # fmt: skip
