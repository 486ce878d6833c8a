"""What is measured of pictures while a model is trained: little, often, and always the same.

Letters: N pictures, S image side.
"""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vqd_jax.data import batches, sets
from vqd_jax.evaluation import attributes, distances, features, measures
from vqd_jax.evaluation.pictures import Extractor, RealPictures
from vqd_jax.pipeline import VQDiffusion

# Real pictures that those of the model are compared with.
_REAL = 2000


class Progress:
    """Distances between training pictures and what a model draws from held-out captions.

    Args:
      config: ``training.evaluate_with`` names the features, ``training.evaluate_pictures`` is N.
      builder: the prepared data set.
      workdir: of the run; features of the real pictures are kept there.
    """

    def __init__(self, config: ConfigDict, builder: Any, workdir: str):
        c = config.training
        chosen = ConfigDict(config.to_dict())
        chosen.evaluation.update(features=c.evaluate_with, inception="", inception_statistics="")
        (net,) = features.of_config(chosen)
        self._config = config
        self._extractor = Extractor(net, Path(workdir) / "features")
        split = sets.evaluation_split(builder)
        records = batches.records(builder, split, decode=False)
        places = np.random.default_rng(0).permutation(len(records))[: c.evaluate_pictures]
        self._records = [records[int(place)] for place in places]
        train = batches.records(builder, "train", decode=False)
        some = np.sort(np.random.default_rng(1).permutation(len(train))[:_REAL])
        source = f"{sets.source_fingerprint(builder)}/train"
        real = RealPictures(train, some, config.data.image_size, source)
        self._real = self._extractor.stored(real, "real pictures").all()

    def measure(self, pipeline: VQDiffusion) -> dict[str, float]:
        """Draws N pictures with the config's sampling and seed.

        Returns:
          ``validation/kid``, its error, ``precision``, ``recall``, ``density`` and ``coverage``;
          and, of shapes, ``attributes``, the share of what the captions ask for.
        """
        prompts = [_prompt(record, self._config) for record in self._records]
        pairs = [(k, 0) for k in range(len(prompts))]
        drawn = pipeline.sample_rows(prompts, pairs, seed=self._config.seed, batch_size=64)
        pixels = pipeline.decode_codes(drawn.codes)
        seen = self._extractor.features(pixels)
        kid = distances.kid(seen, self._real)
        found = {"kid": kid.value, "kid_error": kid.error}
        near = distances.neighbour_metrics(seen, self._real)
        found |= {name: estimate.value for name, estimate in near.items()}
        if self._config.data.name.startswith("shapes_text") and prompts[0]:
            shares = [
                attributes.attribute_scores(image, measures.objects(record))
                for image, record in zip(pixels, self._records, strict=True)
            ]
            found["attributes"] = np.mean([[s[n] for n in attributes.ATTRIBUTES] for s in shares])
        return {f"validation/{name}": float(value) for name, value in found.items()}


def _prompt(record, config) -> str:
    kind = config.denoiser.condition
    if kind == "none":
        return ""
    return record["captions"][0] if kind == "text" else str(int(record["label"]))
