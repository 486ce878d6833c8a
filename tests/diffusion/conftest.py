"""Explicit transition matrices in float64, and the golden files."""

from pathlib import Path

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = Path(__file__).parents[1] / "golden"


NUM_STEPS = 5


def _lines(keep, mask):
    """Cumulative tables with entry 0 clean and straight lines from time 1 to T."""
    return (
        np.concatenate([[1.0], np.linspace(*keep, NUM_STEPS)]),
        np.concatenate([[0.0], np.linspace(*mask, NUM_STEPS)]),
    )


# (keep, mask) tables of very different processes, all valid for any number of codes, and of one
# length so that a function is compiled once for all of them.
TABLES = {
    "released": _lines((0.99999, 0.000009), (0.000009, 0.99999)),
    "paper": _lines((0.99999, 0.000009), (0.000009, 0.9)),
    "replace_heavy": _lines((0.8, 0.05), (0.02, 0.3)),
    "mask_only": _lines((0.8, 0.0), (0.2, 1.0)),
    "replace_only": _lines((0.7, 0.1), (0.0, 0.0)),
    "replace_only_to_uniform": _lines((0.7, 0.0), (0.0, 0.0)),
    "early_end": (np.array([1, 0.5, 0.0, 0.0, 0.0, 0.0]), np.array([0, 0.2, 0.4, 0.4, 0.7, 1.0])),
    "uneven": (np.array([1, 0.9, 0.4, 0.35, 0.3, 0.01]), np.array([0, 0.01, 0.5, 0.5, 0.5, 0.8])),
}


class Matrices:
    """One-step and cumulative (K+1) x (K+1) matrices [to, from] of a process.

    The one-step matrices come from the ratios of the tables, and every other matrix from explicit
    products of them.
    """

    def __init__(self, keep, mask, num_codes):
        self.num_steps, self.num_codes = len(keep) - 1, num_codes
        self.steps = [None]
        for t in range(1, len(keep)):
            to_mask = (mask[t] - mask[t - 1]) / (1 - mask[t - 1])
            # Where nothing is kept any more, replacing once more changes nothing.
            stay = keep[t] / keep[t - 1] if keep[t - 1] > 0 else 1 - to_mask
            matrix = np.full((num_codes + 1,) * 2, (1 - stay - to_mask) / num_codes)
            matrix += stay * np.eye(num_codes + 1)
            matrix[num_codes] = to_mask
            matrix[:, num_codes] = np.eye(num_codes + 1)[num_codes]
            self.steps.append(matrix)

    def between(self, s, t):
        """q(x_t | x_s) as [x_t, x_s]."""
        product = np.eye(self.num_codes + 1)
        for step in range(s + 1, t + 1):
            product = self.steps[step] @ product
        return product

    def posterior(self, p0, x_t, s, t):
        """p(x_s | x_t) = sum_k p0_k q(x_t|x_s) q(x_s|k) / q(x_t|k), over the k that can be."""
        bayes = self.between(s, t)[x_t][:, None] * self.between(0, s)[:, : self.num_codes]
        evidence = self.between(0, t)[x_t, : self.num_codes]
        # A product of matrices leaves rounding where the exact entry is zero.
        can_be = (evidence > 1e-15) & (p0 > 0)
        joint = (bayes[:, can_be] / evidence[can_be]) @ p0[can_be]
        return joint / joint.sum()

    def can_be(self, x_t, t, x0=slice(None)):
        """Whether time t can show x_t, for the clean code x0 or any."""
        return bool(np.any(self.between(0, t)[x_t, : self.num_codes][x0] > 1e-15))


@pytest.fixture(params=TABLES)
def tables(request):
    """(keep, mask) of one process, float64 [T+1] each."""
    return TABLES[request.param]


BEGINNINGS = [
    (name, start)
    for name, (_, mask) in TABLES.items()
    for start in ("schedule", "masked")
    # Where nothing is ever masked no chain can begin from masks.
    if start == "schedule" or mask[-1] > 0
]


@pytest.fixture(params=BEGINNINGS, ids="-".join)
def beginning(request):
    """(tables, start): a process, and how its chains begin."""
    name, start = request.param
    return TABLES[name], start


@pytest.fixture
def golden():
    """Reads a golden file by its name."""
    return lambda name: dict(np.load(GOLDEN / f"{name}.npz"))


@pytest.fixture
def matrices():
    """The class ``Matrices``."""
    return Matrices


@pytest.fixture
def code_distributions():
    """p0 [5, K] float64: one-hot, all but one-hot, uniform, with an impossible code, random."""

    def make(num_codes):
        random = np.random.default_rng(num_codes).dirichlet(np.full(num_codes, 0.5), 2)
        sharp = np.full(num_codes, 1e-7)
        sharp[-1] = 1 - 1e-7 * (num_codes - 1)
        gap = random[0].copy()
        gap[0] = 0
        return np.stack(
            [np.eye(num_codes)[0], sharp, np.full(num_codes, 1 / num_codes), gap / gap.sum(),
             random[1]]
        )  # fmt: skip

    return make
