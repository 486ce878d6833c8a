"""The figures of one set of generated pictures, from features that are in files.

Letters: N generated pictures, R real ones, T training pictures, M pictures to retrieve from,
D features, P prompts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from vqd_jax.errors import UserError
from vqd_jax.evaluation import attributes, distances
from vqd_jax.evaluation.distances import Estimate, Moments, Reference
from vqd_jax.evaluation.pictures import Pictures, Stored

# Most pictures of each kind where all meet all: kernels, and nearest neighbours.
PAIRWISE = 10_000
NEIGHBOURS = 5_000
# Real pictures among which that of a caption is looked for.
RETRIEVAL = 1_000
# Standard deviation in pixels, and the constants of SSIM (Wang et al., 2004).
_SSIM_SIGMA, _SSIM_C1, _SSIM_C2 = 1.5, (0.01 * 255) ** 2, (0.03 * 255) ** 2
# Side of its window: pictures must be larger.
SSIM_WINDOW = 11
# Rows of features that are looked at together.
_CHUNK = 256


def subset(stored: Stored, most: int) -> np.ndarray:
    """All features, or ``most`` that are chosen at random without replacement; the same ones."""
    if len(stored) <= most:
        return stored.all()
    places = np.random.default_rng(0).permutation(len(stored))[:most]
    return stored.take(np.sort(places))


class Statistics(NamedTuple):
    """Mean and covariance of real pictures, and how many there were; None if nobody says."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None


def read_statistics(path: str | Path, width: int) -> Statistics:
    """Those in an .npz file of pytorch-fid or clean-fid (``mu``, ``sigma``), or of ADM.

    Raises:
      UserError: it is no such file, or of another number of features.
    """
    try:
        with np.load(path) as found:
            mean, covariance = (np.asarray(found[n], np.float64) for n in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as statistics (.npz with mu and sigma): {error}"
        ) from error
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise UserError(
            f"{path} has mu {list(mean.shape)} and sigma {list(covariance.shape)}; the features "
            f"are {width}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path} has values that are not finite")
    return Statistics(mean, covariance, None)


def statistics(stored: Stored, weights: np.ndarray | None = None) -> Statistics:
    """Mean and covariance of real pictures, each of which counts ``weights`` times."""
    if weights is None or (weights == 1).all():
        moments = distances.joined(distances.group_moments(stored, stored.width))
        return Statistics(moments.mean, moments.covariance, moments.count)
    parts, start = [], 0
    for block in stored:
        times = weights[start : start + len(block)]
        start += len(block)
        parts.append(Moments.of(block.repeat(times, axis=0)))
    moments = distances.joined(parts)
    return Statistics(moments.mean, moments.covariance, moments.count)


class Real(NamedTuple):
    """Features of real pictures.

    Attributes:
      reference: of the pictures to compare with, [R, D].
      statistics: mean and covariance of these, or of a file.
      training: of training pictures, [T, D]; None leaves the test for copies out.
      held_out: of pictures that were not trained on; None if there are none.
    """

    reference: Stored
    statistics: Reference | None
    training: Stored | None
    held_out: Stored | None


def distance_name(net: str) -> str:
    """What a Frechet distance is called in these features."""
    return "FID" if net.startswith("inception") else f"Frechet distance in {net}"


def of_features(
    made: Stored, real: Real, metrics: Sequence[str], *, unit: bool = False
) -> dict[str, Estimate]:
    """Distances of generated pictures to real ones.

    Args:
      made: features of the generated pictures.
      real: of the real ones.
      metrics: "frechet", "kid", "neighbours" and "copies", or some of them.
      unit: features have length 1, as those of CLIP; then there is CMMD, too.
    """
    found = {}
    if "frechet" in metrics and real.statistics is not None:
        parts = distances.group_moments(made, made.width)
        found |= distances.frechet(parts, real.statistics)
    if "kid" in metrics:
        pair = subset(made, PAIRWISE), subset(real.reference, PAIRWISE)
        found["kid"] = distances.kid(*pair)
        if unit:
            found["cmmd"] = distances.cmmd(*pair)
    if "neighbours" in metrics:
        pair = subset(made, NEIGHBOURS), subset(real.reference, NEIGHBOURS)
        found |= distances.neighbour_metrics(*pair)
    if "copies" in metrics and real.training is not None:
        copied = Copies(real.training)
        found["copies"] = copied.share(made)
        if real.held_out is not None:
            found["copies_held_out"] = copied.share(real.held_out)
    return found


class Copies:
    """The test for copies of training pictures, in some features.

    Args:
      training: features of the training pictures, [T, D].
    """

    def __init__(self, training: Stored):
        self._features = training.all()
        self._spacing = distances.nearest(self._features, self._features, same=True).distance

    def share(self, stored: Stored) -> Estimate:
        """The share of pictures that count as copies; see ``distances.is_copy``."""
        found = [self._is_copy(block) for block in stored]
        return distances.mean_estimate(np.concatenate(found))

    def _is_copy(self, block):
        return distances.is_copy(distances.nearest(block, self._features), self._spacing)

    def neighbours(self, pictures: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest training pictures of features [N, D].

        Returns:
          Their places, the nearest first, int64 [N, count]; and for each picture the distance to
          the nearest one over that of this one to its own nearest, float64 [N].
        """
        against, found = self._features.astype(np.float64), []
        for start in range(0, len(pictures), _CHUNK):
            part = np.asarray(pictures[start : start + _CHUNK], np.float64)
            apart = distances.squared_distances(part, against)
            found.append(np.argsort(apart, axis=1, kind="stable")[:, :count])
        places = np.concatenate(found)
        nearest = distances.nearest(pictures, self._features)
        spacing = np.maximum(self._spacing[nearest.index], 1e-12)
        return places, nearest.distance / spacing


def retrieval(made: Stored, records: np.ndarray, pool: Stored, pool_records: np.ndarray) -> dict:
    """How often the real picture of a caption is nearest to the picture drawn from it.

    Args:
      made: features [N, D].
      records: the real picture of the caption of each, int64 [N].
      pool: features of the M real pictures.
      pool_records: which these are, int64 [M], each once.

    Returns:
      ``retrieval_1`` and ``retrieval_5``, shares of the pictures whose own real one is the nearest
      of M, or one of the five nearest; a tie counts as farther. Nothing if no picture has its real
      one among the M.
    """
    against = np.asarray(pool.all(), np.float64)
    place = {int(record): k for k, record in enumerate(pool_records)}
    ranks, start = [], 0
    for block in made:
        of_block = records[start : start + len(block)]
        start += len(block)
        rows = [(i, place[int(r)]) for i, r in enumerate(of_block) if int(r) in place]
        for first in range(0, len(rows), _CHUNK):
            chosen, own = np.array(rows[first : first + _CHUNK]).T
            apart = distances.squared_distances(np.asarray(block[chosen], np.float64), against)
            mine = apart[np.arange(len(own)), own]
            ranks.append((apart <= mine[:, None]).sum(axis=1))
    if not ranks:
        return {}
    ranks = np.concatenate(ranks)
    return {f"retrieval_{k}": distances.mean_estimate(ranks <= k) for k in (1, 5)}


def clip_score(images: Stored, texts: np.ndarray) -> Estimate:
    """100 max(cos, 0) of pictures and their texts in CLIP's space (Hessel et al., 2104.08718).

    Args:
      images: features [N, D] of length 1.
      texts: features of the P prompts [P, D] of length 1; picture k is of prompt k mod P.
    """
    start, found = 0, []
    for block in images:
        own = texts[(start + np.arange(len(block))) % len(texts)]
        start += len(block)
        found.append(100 * np.maximum((block * own).sum(axis=1), 0))
    return distances.mean_estimate(np.concatenate(found))


def objects(record: dict) -> list[dict] | None:
    """The objects of a record of shapes, each a dict of texts; None of other records."""
    found = record.get("objects")
    if isinstance(found, dict):
        rows = zip(*found.values(), strict=True)
        found = [dict(zip(found, row, strict=True)) for row in rows]
    return list(found) if found else None


def attribute_shares(pictures: Pictures, wanted: Sequence[list[dict] | None], most: int = 2000):
    """Shares of what captions of shapes ask for that pictures show; see ``attributes``.

    Args:
      pictures: N of them.
      wanted: objects of each picture's caption; None leaves it out.
      most: pictures that are read, the first ones.
    """
    found = {}
    for place, objects in list(enumerate(wanted))[:most]:
        if objects is not None:
            scores = attributes.attribute_scores(pictures.read([place])[0], objects)
            for name, value in scores.items():
                found.setdefault(f"attribute_{name}", []).append(value)
    means = {name: distances.mean_estimate(np.array(values)) for name, values in found.items()}
    if found:
        of_picture = np.mean([found[f"attribute_{n}"] for n in attributes.ATTRIBUTES], axis=0)
        means["attributes"] = distances.mean_estimate(of_picture)
    return means


def psnr(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of pictures uint8 [B, S, S, 3], float64 [B]; 100 at most."""
    error = np.square(first.astype(np.float64) - second).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 255**2 / 1e10))


def sharpness(pictures: np.ndarray) -> float:
    """Mean squared difference of neighbouring pixels of pictures uint8 [B, S, S, 3].

    Blurred pictures have less of it than the real ones, noisy pictures more.
    """
    values = pictures.astype(np.float64)
    return float(np.mean(np.diff(values, axis=1) ** 2) + np.mean(np.diff(values, axis=2) ** 2))


def ssim(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Structural similarity of pictures uint8 [B, S, S, 3], float64 [B].

    Wang, Bovik, Sheikh and Simoncelli (2004), on each colour channel: a Gaussian window of 11
    pixels and standard deviation 1.5, in places where it is inside the picture.
    """
    x, y = first.astype(np.float64), second.astype(np.float64)

    def blurred(values):
        return ndimage.gaussian_filter(
            values, (0, _SSIM_SIGMA, _SSIM_SIGMA, 0), truncate=5 / _SSIM_SIGMA
        )

    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    both = blurred(x * y) - mean_x * mean_y
    alike = (2 * mean_x * mean_y + _SSIM_C1) * (2 * both + _SSIM_C2)
    alike /= (mean_x**2 + mean_y**2 + _SSIM_C1) * (var_x + var_y + _SSIM_C2)
    return alike[:, 5:-5, 5:-5].mean(axis=(1, 2, 3))


def code_use(counts: np.ndarray) -> dict[str, Any]:
    """What of a codebook is used, from how often each code is, int64 [K]."""
    share = counts[counts > 0] / counts.sum()
    return {
        "codes": len(counts),
        "codes_used": int((counts > 0).sum()),
        "code_perplexity": float(np.exp(-(share * np.log(share)).sum())),
    }
