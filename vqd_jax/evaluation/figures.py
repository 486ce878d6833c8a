"""What one network of features tells of the pictures of an evaluation.

Letters: N generated pictures, R real ones, P prompts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vqd_jax.data import batches, sets
from vqd_jax.evaluation import ceiling, distances, features, measures, protocols
from vqd_jax.evaluation.features import FeatureNet
from vqd_jax.evaluation.measures import Real
from vqd_jax.evaluation.pictures import Extractor, Pictures, RealPictures, Stored
from vqd_jax.parallel import processes
from vqd_jax.pipeline import VQDiffusion

# Training pictures among which copies are looked for, and held-out ones beside them.
TRAINING, HELD_OUT = 50_000, 2_000
# Real pictures that go through the autoencoder.
RECONSTRUCTED = 10_000


class Request(NamedTuple):
    """What is to be measured.

    Attributes:
      config: the data, the protocol, and how pictures are drawn unless a setting says otherwise.
      model: to draw from, and whose autoencoder is the ceiling; None if ``pictures`` are measured.
      params, autoencoder_params: of the model.
      plan: the protocol, applied to the data set.
      builder: the prepared data set.
      records: of the split of the prompts, without pixels.
      output: folder to write.
    """

    config: ConfigDict
    model: VQDiffusion | None
    params: Any
    autoencoder_params: Any
    plan: protocols.Plan
    builder: Any
    records: Sequence[dict]
    output: Path


class Made(NamedTuple):
    """N pictures that are measured together.

    Attributes:
      setting: what made them, for the report.
      pictures: where they are.
      prompts: of each picture k, at k mod P; None if nobody tells.
      records: the place of the real picture of each prompt, int64 [P]; -1 is none.
    """

    setting: dict[str, Any]
    pictures: Pictures
    prompts: list[str] | None
    records: np.ndarray


class Measured(NamedTuple):
    """What one network tells; empty in other processes than the first.

    Attributes:
      figures: of each setting: {name: Estimate}.
      ceiling: of reconstructed real pictures, likewise; empty without a model.
      copies: the test for copies; None if it is not asked for.
      made: features of the pictures of each setting.
    """

    figures: list[dict[str, Any]]
    ceiling: dict[str, Any]
    copies: measures.Copies | None
    made: list[Stored]


def real_pictures(request: Request, split: str, places: np.ndarray) -> RealPictures:
    """Pictures of the data set at these places of a split."""
    records = request.records
    if split != request.plan.prompt_split:
        records = batches.records(request.builder, split, decode=False)
    source = f"{sets.source_fingerprint(request.builder)}/{split}"
    return RealPictures(records, places, request.config.data.image_size, source)


def some_of(count: int, most: int) -> np.ndarray:
    """At most so many of ``count`` places, at random without replacement; they rise."""
    return np.sort(np.random.default_rng(1).permutation(count)[:most])


def reconstructible(request: Request) -> RealPictures:
    """Those real pictures of the protocol that go through the autoencoder."""
    plan = request.plan
    places = plan.reference[some_of(len(plan.reference), RECONSTRUCTED)]
    return real_pictures(request, plan.reference_split, places)


def pool(request: Request) -> tuple[RealPictures | None, list[str]]:
    """Real pictures of prompts, among which one is retrieved, and a prompt of each."""
    first = {}
    for text, record in zip(request.plan.prompts, request.plan.records.tolist(), strict=True):
        if record >= 0:
            first.setdefault(record, text)
    places = np.array(list(first)[: measures.RETRIEVAL], np.int64)
    if not len(places):
        return None, []
    texts = [first[place] for place in places.tolist()]
    return real_pictures(request, request.plan.prompt_split, places), texts


def training_pictures(request: Request) -> RealPictures | None:
    """Those among which copies are looked for; None if the data set has no training split."""
    splits = request.builder.info.splits
    if "train" not in splits:
        return None
    return real_pictures(request, "train", some_of(splits["train"].num_examples, TRAINING))


def held_out_pictures(request: Request) -> RealPictures | None:
    """Those that the test for copies is tried on; None if there are none."""
    splits = request.builder.info.splits
    names = [name for name in ("validation", "test") if name in splits]
    if not names:
        return None
    return real_pictures(request, names[0], some_of(splits[names[0]].num_examples, HELD_OUT))


class _Features(NamedTuple):
    """Features of all pictures, in files. Those that are not asked for are None."""

    reference: Stored
    training: Stored | None
    held_out: Stored | None
    pool: Stored | None
    made: list[Stored]
    again: Stored | None


def measure(
    request: Request, net: FeatureNet, made: Sequence[Made], clip: features.Clip | None
) -> Measured:
    """Features of all pictures in one network, and what the first process makes of them.

    Args:
      request: the evaluation.
      net: the network.
      made: the generated pictures of every setting.
      clip: both towers of CLIP, if there is one; ``net`` may be its tower of images.
    """
    clip = clip if clip is not None and net is clip.images else None
    found = _extract(request, net, made, with_pool=clip is not None)
    if not processes.is_writer():
        return Measured([], {}, None, found.made)
    real = Real(
        found.reference, _statistics(request, net, found.reference), found.training, found.held_out
    )
    pictures, texts = pool(request)
    figures = []
    for one, stored in zip(made, found.made, strict=True):
        logging.info("measuring %s in %s", one.setting, net.name)
        figure = measures.of_features(
            stored, real, request.config.evaluation.metrics, unit=clip is not None
        )
        if "retrieval" in request.config.evaluation.metrics and found.pool and one.prompts:
            of_pictures = one.records[np.arange(len(stored)) % len(one.records)]
            figure |= measures.retrieval(stored, of_pictures, found.pool, pictures.places)
        if clip and one.prompts:
            figure["clip_score"] = measures.clip_score(stored, clip.texts(one.prompts))
        figures.append(figure)
    of_ceiling = _ceiling(request, net, real, found.again, unit=clip is not None)
    if clip and found.pool:
        of_ceiling["clip_score"] = measures.clip_score(found.pool, clip.texts(texts))
    copies = measures.Copies(found.training) if found.training else None
    return Measured(figures, of_ceiling, copies, found.made)


def _extract(request, net, made, with_pool) -> _Features:
    c = request.config.evaluation
    extractor = Extractor(net, c.cache or request.output / "features")

    def stored(pictures, description):
        return None if pictures is None else extractor.stored(pictures, description)

    plan = request.plan
    real = real_pictures(request, plan.reference_split, plan.reference)
    reference = stored(real, "real pictures")
    training = held_out = again = None
    if "copies" in c.metrics:
        # The same pictures have the same files.
        training = stored(training_pictures(request), "training pictures")
        held_out = stored(held_out_pictures(request), "held-out pictures")
    in_pool = pool(request)[0] if with_pool or "retrieval" in c.metrics else None
    in_pool = stored(in_pool, "pictures of the prompts")
    of_made = [stored(one.pictures, "generated pictures") for one in made]
    if request.model is not None:
        passed = ceiling.reconstructed(
            request.model, reconstructible(request), request.autoencoder_params
        )
        again = stored(passed, "reconstructions")
    return _Features(reference, training, held_out, in_pool, of_made, again)


def _statistics(request, net, reference) -> distances.Reference | None:
    c = request.config.evaluation
    if "frechet" not in c.metrics:
        return None
    if c.inception_statistics and net.name.startswith("inception"):
        found = measures.read_statistics(c.inception_statistics, net.width)
    else:
        found = measures.statistics(reference, request.plan.weights)
    return distances.Reference(found.mean, found.covariance)


def _ceiling(request, net, real, again, unit) -> dict[str, Any]:
    if again is None:
        return {}
    metrics = [m for m in request.config.evaluation.metrics if m not in ("copies", "retrieval")]
    if len(again) <= net.width:
        metrics = [m for m in metrics if m != "frechet"]
    return measures.of_features(again, real, metrics, unit=unit)
