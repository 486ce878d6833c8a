"""What a user chooses when sampling, in the words of the command line and of ``VQDiffusion``.

Letters: N image tokens, K codes, S sampling steps, T steps of the schedule.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vqd_jax.diffusion import rules, sampler, shaping
from vqd_jax.diffusion.schedule import Schedule

# What a step of the sampler does, by the name that configs and the command line use.
RULES: dict[str, Callable[[tuple[int, int]], Callable]] = {
    "ordinary": lambda grid: rules.Ancestral(),
    "high_quality": lambda grid: rules.HighQuality(),
    "purity": lambda grid: rules.Purity(1.0),
    "confidence": lambda grid: rules.Confidence(),
    "halton": rules.Halton,
    "flow": lambda grid: rules.Flow(),
    "remask": lambda grid: rules.Remask(),
    "moment": lambda grid: rules.Moment(),
}


def settings(
    schedule: Schedule,
    grid: tuple[int, int],
    *,
    num_steps: int = 0,
    times: Sequence[int] | None = None,
    published_fast: int | None = None,
    rule: str | Callable = "ordinary",
    calls_per_step: int = 1,
    guidance_scale: float | Sequence[float] = 1.0,
    guidance_ramp: bool = False,
    guidance_interval: tuple[float, float] | None = None,
    truncation: float = 1.0,
    known: np.ndarray | None = None,
    initial: np.ndarray | None = None,
    strength: float = 1.0,
    top_k: int | None = None,
    temperature: float = 1.0,
    start: str | None = None,
    trajectory: bool = False,
) -> sampler.Settings:
    """The settings of these choices.

    Args:
      schedule: of the model.
      grid: rows and columns of the tokens.
      num_steps: S, 1..T; 0 is T. An image begins later than at T if some of its codes are known, or
        if ``strength`` is below 1; it calls the network at most once for every time that is left.
      times: S + 1 times from 0 to at most T, increasing, instead of ``num_steps``.
      published_fast: speed of the published "fast inference", 2..T, instead of ``num_steps`` and
        ``rule``.
      rule: what a step does: a name in ``RULES`` or a callable of ``diffusion.rules``.
      guidance_scale: 1 is no guidance; or one scale for each step.
      guidance_ramp: the scale rises evenly from 1 to ``guidance_scale``.
      guidance_interval: shares of the steps at which guidance begins and ends, such as (0.2, 0.8).
      truncation: share of the probability that is kept; 1 is all.
      known, initial: of ``sampler.Settings``, int32 [N] for all images or one row for each.
      strength, calls_per_step, top_k, temperature, start, trajectory: of ``sampler.Settings``.

    Raises:
      ValueError: a value is impossible; the message begins with its name.
    """
    _require(0 < strength <= 1, f"strength={strength}: must lie above 0 and up to 1")
    _require(truncation > 0, f"truncation={truncation}: must be positive")
    steps = _steps(schedule, num_steps, times, published_fast)
    count = len(steps["times"]) - 1 if "times" in steps else num_steps or schedule.num_steps
    chosen = {
        "rule": _rule(rule, grid),
        "guidance": _scales(guidance_scale, guidance_ramp, guidance_interval, count),
        "truncation": None if truncation >= 1 else jnp.float32(truncation),
        "calls_per_step": calls_per_step,
    }
    drawn = {"top_k": top_k, "temperature": temperature, "start": start, "trajectory": trajectory}
    begun = {"known": known, "initial": initial, "strength": float(strength)}
    return sampler.Settings(**(chosen | drawn | begun | steps))


def _steps(schedule, num_steps, times, published_fast) -> dict[str, Any]:
    total = schedule.num_steps
    _require(
        0 <= num_steps <= total, f"num_steps={num_steps}: must lie in 0..{total}; 0 is {total}"
    )
    given = [num_steps > 0, times is not None, published_fast is not None]
    _require(sum(given) <= 1, "num_steps, times, published_fast: give one of them")
    if published_fast is not None:
        fast = sampler.published_fast(published_fast, schedule)
        return {"times": fast.times, "rule": fast.rule}
    if times is None:
        return {"num_steps": num_steps}
    sampler.listed_times(tuple(times), schedule)
    return {"times": tuple(int(time) for time in times)}


def _rule(rule: str | Callable, grid: tuple[int, int]) -> Callable:
    if callable(rule):
        return rule
    _require(rule in RULES, f"rule={rule!r}: must be one of {', '.join(RULES)}")
    return RULES[rule](grid)


def _scales(scale, ramp: bool, interval, num_steps: int):
    """The guidance of ``sampler.Settings``: None, float32 [] or float32 [S]."""
    if np.size(scale) == 1:
        scale = np.ravel(scale)[0].item()
    low = np.min(scale)
    _require(0 <= low <= np.max(scale) < math.inf, f"guidance_scale={scale}: must be at least 0")
    if np.ndim(scale):
        _require(len(scale) == num_steps, f"guidance_scale={scale}: there are {num_steps} steps")
        _require(not ramp and interval is None, "guidance_scale: one scale, or one a step")
        return np.asarray(scale, np.float32)
    _require(not (ramp and interval), "guidance_ramp, guidance_interval: give one of them")
    if scale == 1:
        return None
    if ramp:
        return shaping.ramp(scale, num_steps)
    if interval is None:
        return jnp.float32(scale)
    reason = f"guidance_interval={interval}: must be two shares, the first less than the last"
    _require(len(interval) == 2 and 0 <= interval[0] < interval[1] <= 1, reason)
    return shaping.interval(scale, num_steps, *interval)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
