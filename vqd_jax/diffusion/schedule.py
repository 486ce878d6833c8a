"""Noise schedules of mask-and-replace diffusion (VQ-Diffusion, section 4.2 of arXiv:2111.14822).

A code of the clean image passes through a Markov chain over the K codes and the mask token. After
t steps it is

* still the code it was with probability      keep[t]    (the paper's alpha-bar) + replace[t],
* each other code with probability            replace[t] (beta-bar),
* the mask token with probability             mask[t]    (gamma-bar),

and ``keep[t] + K * replace[t] + mask[t] = 1``. Time runs 0..T, and 0 is clean data.

Letters: T number of steps, K number of codes.
"""

import dataclasses
import functools

import jax
import numpy as np

# End points of the published weights: the replace mass is 1 - 0.99999 - 0.000009 = 1e-6 at every
# time, so that the process is mask-only for practical purposes.
RELEASED_KEEP = (0.99999, 0.000009)
RELEASED_MASK = (0.000009, 0.99999)
# End points of the paper: gamma-bar rises to 0.9 and K * beta-bar to 0.1.
PAPER_KEEP = (0.99999, 0.000009)
PAPER_MASK = (0.000009, 0.9)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keep", "replace", "mask"],
    meta_fields=["num_codes"],
)
@dataclasses.dataclass(frozen=True)
class Schedule:
    """Cumulative probabilities of one token, indexed by time; entry 0 is clean data.

    Attributes:
      keep: float32 [T+1], probability that nothing has happened to the token.
      replace: float32 [T+1], probability of having become one given code by replacement.
      mask: float32 [T+1], probability of being masked.
      num_codes: K.
    """

    keep: jax.Array
    replace: jax.Array
    mask: jax.Array
    num_codes: int

    @property
    def num_steps(self) -> int:
        """T."""
        return self.keep.shape[0] - 1


def linear(
    num_steps: int,
    num_codes: int,
    keep: tuple[float, float],
    mask: tuple[float, float],
) -> Schedule:
    """Keep and mask probabilities linear in time from their values at time 1 to those at time T.

    Args:
      num_steps: T >= 1.
      num_codes: K >= 2.
      keep: keep probability at times 1 and T.
      mask: mask probability at times 1 and T.

    Raises:
      ValueError: a probability that is negative, or a chain that would have to undo noise; the
        message names the time and the value.
    """
    if num_steps < 1:
        raise ValueError(f"a schedule needs num_steps >= 1, got {num_steps}")
    return from_tables(
        np.append(1.0, np.linspace(*keep, num_steps)),
        np.append(0.0, np.linspace(*mask, num_steps)),
        num_codes,
    )


def released(num_steps: int, num_codes: int) -> Schedule:
    """The schedule that the published weights were trained with."""
    return linear(num_steps, num_codes, RELEASED_KEEP, RELEASED_MASK)


def paper(num_steps: int, num_codes: int) -> Schedule:
    """The schedule that the paper describes: mask share to 0.9, replace share to 0.1."""
    return linear(num_steps, num_codes, PAPER_KEEP, PAPER_MASK)


def cosine(num_steps: int, num_codes: int, replaced: float = 0.0) -> Schedule:
    """1 - keep = sin(pi t / 2T), the mask share of MaskGIT (arXiv:2202.04200) seen from clean data.

    ``replaced`` of that noise, 0..1, is replacement and the rest masks; 0 is mask-only.
    """
    if num_steps < 1:
        raise ValueError(f"a schedule needs num_steps >= 1, got {num_steps}")
    if not 0 <= replaced <= 1:
        raise ValueError(f"the replaced share of the noise must lie in [0, 1], got {replaced}")
    noise = np.sin(0.5 * np.pi * np.arange(num_steps + 1, dtype=np.float64) / num_steps)
    return from_tables(1.0 - noise, (1.0 - replaced) * noise, num_codes)


def from_tables(keep: np.ndarray, mask: np.ndarray, num_codes: int) -> Schedule:
    """A schedule from float64 tables of length T+1 whose entry 0 is clean data (1 and 0)."""
    if num_codes < 2:
        raise ValueError(f"a schedule needs num_codes >= 2, got {num_codes}")
    keep, mask = np.asarray(keep, np.float64), np.asarray(mask, np.float64)
    replaced = 1.0 - keep - mask
    # 1 - keep - mask carries the rounding of float64; that much below zero is zero.
    replaced = np.where(np.abs(replaced) < 1e-15, 0.0, replaced)
    for name, table in (("keep", keep), ("mask", mask), ("replace", replaced)):
        bad = np.flatnonzero(~(table >= 0) | ~(table <= 1))
        if bad.size:
            raise ValueError(
                f"the {name} probability at time {bad[0]} is {table[bad[0]]}: "
                "keep, mask and 1 - keep - mask must lie in [0, 1]"
            )
    if keep[0] != 1 or mask[0] != 0:
        raise ValueError(f"time 0 is clean data: keep 1 and mask 0, not {keep[0]} and {mask[0]}")
    _require_steps_are_noise(keep, mask, replaced)
    tables = (np.asarray(x, np.float32) for x in (keep, replaced / num_codes, mask))
    return Schedule(*tables, num_codes)


def _require_steps_are_noise(keep, mask, replaced):
    """Every step must be a stochastic matrix: no step may unmask or un-replace."""
    for t in range(1, len(keep)):
        if mask[t] < mask[t - 1]:
            raise ValueError(f"the mask probability falls at time {t}: {mask[t - 1]} to {mask[t]}")
        if keep[t] > keep[t - 1]:
            raise ValueError(f"the keep probability rises at time {t}: {keep[t - 1]} to {keep[t]}")
        # The replace mass of the step from t-1 to t, times keep[t-1] * (1 - mask[t-1]) >= 0.
        step = keep[t - 1] * replaced[t] - keep[t] * replaced[t - 1]
        if step < -1e-15:
            raise ValueError(
                f"the step to time {t} would need a negative replace probability: replaced over "
                f"kept mass falls from {replaced[t - 1] / max(keep[t - 1], 1e-300)} "
                f"to {replaced[t] / max(keep[t], 1e-300)}"
            )
