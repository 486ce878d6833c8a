"""How far generated pictures are from real ones, computed from features of both.

Every figure comes with an error. It is the jackknife over ``GROUPS`` groups of generated pictures:
the figure is computed again without each group, so from subsets without replacement, because a
picture that is drawn twice would bias distances and nearest neighbours. The real pictures are taken
as they are.

Letters: N generated pictures, R real ones, D features, G groups, k neighbours.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vqd_jax.errors import UserError

GROUPS = 10
# Groups in a subset from which the Frechet distance is extrapolated; see ``frechet``.
_SUBSETS = (5, 7, 9)
# Of CMMD (Jayasumana et al., arXiv:2401.09603): the width of the kernel, and the scale.
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
# Neighbours of precision and recall (arXiv:1904.06991), and of density and coverage
# (arXiv:2002.09797).
PRECISION_K, DENSITY_K = 3, 5
# Rows of features that meet all others at once.
_CHUNK = 1024


class Estimate(NamedTuple):
    """A figure and its standard error."""

    value: float
    error: float


class Moments(NamedTuple):
    """What a Frechet distance needs of features; float64. ``+`` joins those of two parts.

    Attributes:
      count: pictures.
      mean: [D].
      scatter: [D, D], the sum of outer products of the features less their mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Those of features [N, D], N >= 1."""
        features = np.asarray(features, np.float64)
        mean = features.mean(axis=0)
        centred = features - mean[None]
        return cls(len(features), mean, centred.T @ centred)

    def __add__(self, other: "Moments") -> "Moments":
        # Chan, Golub, LeVeque (1983): no difference of large sums.
        count = self.count + other.count
        step = other.mean - self.mean
        mean = self.mean + step * (other.count / count)
        apart = np.outer(step, step) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + apart)

    @property
    def covariance(self) -> np.ndarray:
        """[D, D], unbiased."""
        return self.scatter / (self.count - 1)


def groups(count: int) -> np.ndarray:
    """The group of each of ``count`` pictures, int64 [count]; a longer list begins with the same.

    Each G pictures that follow each other are in different groups, in random order.
    """
    random = np.random.default_rng(0).random((-(-count // GROUPS), GROUPS))
    return random.argsort(axis=1).reshape(-1)[:count]


def group_moments(features: Iterable[np.ndarray], dim: int) -> list[Moments]:
    """The moments of every group of a stream of features [n, D]; memory does not grow with N."""
    found, start = {}, 0
    for part in features:
        # A prefix of the list is enough for the rows so far.
        of_rows = groups(start + len(part))[start:]
        start += len(part)
        for group in np.unique(of_rows).tolist():
            moments = Moments.of(part[of_rows == group])
            found[group] = found[group] + moments if group in found else moments
    empty = Moments(0, np.zeros(dim), np.zeros((dim, dim)))
    return [found.get(group, empty) for group in range(GROUPS)]


def joined(parts: Sequence[Moments]) -> Moments:
    """The moments of several parts together."""
    parts = [part for part in parts if part.count]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def require_covariance(count: int, dim: int, what: str) -> None:
    """Raises ``UserError`` if a covariance of D features from so many pictures is singular."""
    if count <= dim:
        raise UserError(
            f"{count} {what} are too few for a covariance of {dim} features, which needs at least "
            f"{dim + 1}: take more, or leave frechet out of config.evaluation.metrics"
        )


class Reference:
    """Moments of real pictures, ready to be compared with.

    Args:
      mean: float64 [D].
      covariance: float64 [D, D].
    """

    def __init__(self, mean: np.ndarray, covariance: np.ndarray):
        self.mean, self.trace = mean, np.trace(covariance)
        values, vectors = np.linalg.eigh(covariance)
        # Rounding makes small negative ones.
        roots = np.sqrt(np.clip(values, 0, None))
        self._root = (vectors * roots[None]) @ vectors.T

    def distance(self, mean: np.ndarray, covariance: np.ndarray) -> float:
        """The squared Frechet distance of two normal distributions.

        |m - m'|^2 + tr(C + C' - 2 (C^1/2 C' C^1/2)^1/2)  (Heusel et al., arXiv:1706.08500).

        The product is symmetric, so that its eigenvalues are real and the root needs no matrix.
        """
        product = self._root @ covariance @ self._root
        values = np.linalg.eigvalsh((product + product.T) / 2)
        root = np.sqrt(np.clip(values, 0, None)).sum()
        apart = np.square(mean - self.mean).sum()
        return float(apart + np.trace(covariance) + self.trace - 2 * root)

    def of_moments(self, moments: Moments) -> float:
        """``distance`` to pictures with these moments."""
        return self.distance(moments.mean, moments.covariance)


def jackknife(value: float, without: Sequence[float]) -> Estimate:
    """A figure, and its error from the same figure without each of the groups."""
    without = np.asarray(without, np.float64)
    spread = np.square(without - without.mean()).sum()
    return Estimate(float(value), float(np.sqrt(spread * (len(without) - 1) / len(without))))


def mean_estimate(values: np.ndarray) -> Estimate:
    """The mean of one number a picture, and its standard error."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(float(values.mean()), float(error))


def frechet(parts: Sequence[Moments], reference: Reference) -> dict[str, Estimate]:
    """The Frechet distance, and what it would be with endless generated pictures.

    Its bias is nearly proportional to 1/N, with a factor that depends on the model (Chong and
    Forsyth, arXiv:1911.07023). A line in 1/N through the distances of subsets leads to 1/N = 0. The
    subsets are the runs of 5, 7 and 9 neighbouring groups on a circle of G, and all of them.

    Args:
      parts: moments of the G groups of generated pictures.
      reference: of the real ones.

    Returns:
      ``frechet`` and ``frechet_extrapolated``.
    """
    whole = reference.of_moments(joined(parts))
    members, counts, distances = [np.ones(GROUPS, bool)], [sum(p.count for p in parts)], [whole]
    for size in _SUBSETS:
        for first in range(GROUPS):
            chosen = np.zeros(GROUPS, bool)
            chosen[(first + np.arange(size)) % GROUPS] = True
            some = joined([part for part, use in zip(parts, chosen, strict=True) if use])
            members.append(chosen)
            counts.append(some.count)
            distances.append(reference.of_moments(some))
    members, inverse = np.array(members), 1 / np.array(counts, np.float64)
    distances = np.array(distances)

    def at_zero(rows):
        return np.polyfit(inverse[rows], distances[rows], 1)[1]

    leave_one = members.sum(axis=1) == GROUPS - 1
    without = [at_zero(~members[:, group]) for group in range(GROUPS)]
    return {
        "frechet": jackknife(whole, distances[leave_one]),
        "frechet_extrapolated": jackknife(at_zero(slice(None)), without),
    }


Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x . y / D + 1)^3 of rows, that of KID (Binkowski et al., arXiv:1801.01401)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """exp(-|x - y|^2 / (2 sigma^2)) of rows, that of CMMD."""
    return np.exp(-squared_distances(x, y) / (2 * CMMD_SIGMA**2))


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x - y|^2 of rows [n, D] and [m, D], [n, m] in their dtype; never negative."""
    norms = np.square(x).sum(1)[:, None] + np.square(y).sum(1)[None]
    return np.maximum(norms - 2 * (x @ y.T), 0)


def _kernel_sums(x: list[np.ndarray], y: list[np.ndarray], kernel: Kernel) -> np.ndarray:
    """Sum of the kernel over all pairs of a part of ``x`` and one of ``y``."""
    return np.array([[kernel(a, b).sum() if len(a) and len(b) else 0.0 for b in y] for a in x])


def mean_discrepancy(
    generated: np.ndarray, real: np.ndarray, kernel: Kernel, *, unbiased: bool
) -> Estimate:
    """The squared maximum mean discrepancy of features [N, D] and [R, D].

    The mean of the kernel over pairs of generated pictures and over pairs of real ones, less twice
    the mean over pairs of both kinds. ``unbiased`` leaves out the pairs of a picture with itself.
    """
    generated, real = (np.asarray(x, np.float64) for x in (generated, real))
    of_rows = groups(len(generated))
    parts = [generated[of_rows == group] for group in range(GROUPS)]
    chunks = np.array_split(real, max(1, len(real) // _CHUNK))
    sizes = np.array([len(part) for part in parts])
    own = _kernel_sums(parts, parts, kernel)
    across = _kernel_sums(parts, chunks, kernel).sum(axis=1)
    diagonal = np.array([sum(kernel(x[None], x[None]).item() for x in part) for part in parts])
    num_real, of_real = len(real), _kernel_sums(chunks, chunks, kernel).sum()
    if unbiased:
        of_real -= sum(kernel(x[None], x[None]).item() for x in real)
        of_real /= num_real * (num_real - 1)
    else:
        of_real /= num_real**2

    def discrepancy(chosen):
        count = sizes[chosen].sum()
        pairs = own[np.ix_(chosen, chosen)].sum() - (diagonal[chosen].sum() if unbiased else 0)
        pairs /= count * (count - 1) if unbiased else count**2
        return pairs + of_real - 2 * across[chosen].sum() / (count * num_real)

    everything = np.ones(GROUPS, bool)
    without = [discrepancy(np.arange(GROUPS) != group) for group in range(GROUPS)]
    return jackknife(discrepancy(everything), without)


def kid(generated: np.ndarray, real: np.ndarray) -> Estimate:
    """The kernel distance, unbiased in the number of pictures."""
    return mean_discrepancy(generated, real, polynomial_kernel, unbiased=True)


def cmmd(generated: np.ndarray, real: np.ndarray) -> Estimate:
    """CMMD of features of length 1, times 1,000 and with the pairs of a picture with itself."""
    found = mean_discrepancy(generated, real, gaussian_kernel, unbiased=False)
    return Estimate(CMMD_SCALE * found.value, CMMD_SCALE * found.error)


def radii(distances: np.ndarray, k: int) -> np.ndarray:
    """Distance of each picture to its k-th neighbour, of distances [N, N] between them."""
    # The nearest one is the picture itself.
    return np.partition(distances, k, axis=1)[:, k]


def precision_recall(
    own: np.ndarray, real: np.ndarray, across: np.ndarray, k: int
) -> dict[str, float]:
    """Precision, recall, density and coverage from squared distances.

    The ball of a picture reaches to its k-th neighbour of the same kind. Precision is the share of
    generated pictures in the ball of any real one; density counts the balls, over k. Recall is the
    share of real pictures in the ball of any generated one. Coverage is the share of real pictures
    with a generated one in their ball.

    Args:
      own, real: between generated pictures [N, N], and between real ones [R, R].
      across: from real ones to generated ones [R, N].
      k: neighbours.
    """
    of_real, of_generated = radii(real, k), radii(own, k)
    inside = across < of_real[:, None]
    return {
        "precision": float(inside.any(axis=0).mean()),
        "recall": float((across < of_generated[None]).any(axis=1).mean()),
        "density": float(inside.sum(axis=0).mean() / k),
        "coverage": float(inside.any(axis=1).mean()),
    }


def neighbour_metrics(generated: np.ndarray, real: np.ndarray) -> dict[str, Estimate]:
    """Precision and recall of 3 neighbours, density and coverage of 5.

    Args:
      generated, real: features [N, D] and [R, D]; N^2 + R^2 + N R numbers are held.

    Raises:
      UserError: there are too few pictures for so many neighbours.
    """
    least = -(-(DENSITY_K + 1) * GROUPS // (GROUPS - 1))
    if min(len(generated), len(real)) < least:
        raise UserError(
            f"{len(generated)} generated and {len(real)} real pictures are too few for {DENSITY_K} "
            f"neighbours: take at least {least} of each"
        )
    generated, real = (np.asarray(x, np.float64) for x in (generated, real))
    # Distances are the same, and their rounding errors smaller.
    centre = real.mean(axis=0)[None]
    generated, real = generated - centre, real - centre
    own, of_real = (_self_distances(x) for x in (generated, real))
    across = squared_distances(real, generated)
    of_rows = groups(len(generated))

    def measure(keep):
        some = own[np.ix_(keep, keep)], of_real, across[:, keep]
        found = precision_recall(*some, PRECISION_K)
        dense = precision_recall(*some, DENSITY_K)
        return found | {name: dense[name] for name in ("density", "coverage")}

    whole = measure(np.ones(len(generated), bool))
    without = [measure(of_rows != group) for group in range(GROUPS)]
    return {n: jackknife(value, [w[n] for w in without]) for n, value in whole.items()}


def _self_distances(x: np.ndarray) -> np.ndarray:
    distances = squared_distances(x, x)
    np.fill_diagonal(distances, 0)
    return distances


class Nearest(NamedTuple):
    """The nearest training picture of each of N pictures.

    Attributes:
      index: of the training picture, int64 [N].
      distance: to it, float64 [N].
    """

    index: np.ndarray
    distance: np.ndarray


def nearest(pictures: np.ndarray, training: np.ndarray, *, same: bool = False) -> Nearest:
    """The nearest training picture of each picture, of features [N, D] and [R, D].

    With ``same`` the two are the same pictures, and none is its own neighbour.
    """
    centre = np.asarray(training, np.float64).mean(axis=0)[None]
    training = np.asarray(training, np.float64) - centre
    index, distance = [], []
    for start in range(0, len(pictures), _CHUNK):
        part = np.asarray(pictures[start : start + _CHUNK], np.float64) - centre
        found = squared_distances(part, training)
        if same:
            found[np.arange(len(part)), start + np.arange(len(part))] = np.inf
        best = found.argmin(axis=1)
        index.append(best)
        # Anew for the winner alone: a copy has distance 0, not what rounding leaves of it.
        distance.append(np.linalg.norm(part - training[best], axis=1))
    return Nearest(np.concatenate(index), np.concatenate(distance))


def is_copy(found: Nearest, spacing: np.ndarray) -> np.ndarray:
    """Which pictures are nearer to a training picture than that is to all others, bool [N].

    The share of these is one less "authenticity" (Alaa et al., arXiv:2102.08921). Pictures that
    were held out have a share, too: compare with theirs.

    Args:
      found: the nearest training pictures.
      spacing: distance of each training picture to its nearest other one, [R].
    """
    return found.distance < spacing[found.index]
