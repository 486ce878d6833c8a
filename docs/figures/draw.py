"""Draws the figures of docs/mathematics.md beside this file.

pip install -e '.[docs]'
python docs/figures/draw.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from vqd_jax.diffusion import sampler, schedule, transition

HERE = Path(__file__).parent
NUM_STEPS, NUM_CODES = 100, 2887
SCHEDULES = {
    "released": schedule.released(NUM_STEPS, NUM_CODES),
    "paper": schedule.paper(NUM_STEPS, NUM_CODES),
}


def save(figure, name):
    figure.savefig(HERE / name, dpi=80, bbox_inches="tight")
    plt.close(figure)


def draw_schedules():
    """Keep, replace and mask mass over time."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True)
    for axis, (name, s) in zip(axes, SCHEDULES.items(), strict=True):
        axis.plot(s.keep, label="keep $A_t$")
        axis.plot(NUM_CODES * s.replace, label="replace $K B_t$")
        axis.plot(s.mask, label="mask $C_t$")
        axis.set(title=name, xlabel="time t", ylim=(-0.03, 1.03))
    axes[0].set_ylabel("probability")
    axes[1].legend(frameon=False)
    save(figure, "schedules.png")


def change_probabilities(s, p):
    """Probability [T] that a visible code, of probability p under p0, changes from t to t-1."""
    log_x0 = jnp.log(jnp.full(NUM_CODES, (1 - p) / (NUM_CODES - 1)).at[0].set(p))
    times = jnp.arange(1, NUM_STEPS + 1)
    stay = jax.vmap(lambda t: transition.posterior(log_x0, 0, t - 1, t, s)[0])(times)
    return -np.expm1(np.asarray(stay, np.float64))


def draw_changes():
    """How likely a visible token is to change in one step."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True)
    for axis, (name, s) in zip(axes, SCHEDULES.items(), strict=True):
        for p in (0.1, 0.5, 0.9):
            axis.plot(range(1, NUM_STEPS + 1), change_probabilities(s, p), label=f"$p_0(x)$ = {p}")
        axis.set(title=name, xlabel="time t", yscale="log", ylim=(3e-4, 2))
    axes[0].set_ylabel("probability of another code")
    axes[1].legend(frameon=False)
    save(figure, "changes.png")


def masked_shares(mask, steps):
    """Expected share of masked tokens after every (s, t) of a chain that begins all masked."""
    return np.cumprod([mask[s] / mask[t] for s, t in steps])


def draw_revealed():
    """Share of tokens revealed at every call: exact strided and published fast sampling."""
    s = SCHEDULES["released"]
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True)
    for axis, speed in zip(axes, (3, 10), strict=True):
        settings = sampler.published_fast(speed, s)
        called = settings.times[:0:-1]
        ends = [int(settings.rule.posterior_time(t)) for t in called]
        times = sampler.step_times(len(called), s)
        chains = {
            "exact": list(zip(times[1:], times[:-1], strict=True)),
            "published fast": [(t - 1, t) for t in ends],
        }
        for name, steps in chains.items():
            masked = np.append(1.0, masked_shares(s.mask, steps))
            axis.plot(range(1, len(masked)), -np.diff(masked), ".-", label=name)
            print(f"{len(called)} calls, {name}: at most {-np.diff(masked).min():.1%} in one")
        axis.set(title=f"{len(called)} calls for {NUM_STEPS} steps", xlabel="call")
    axes[0].set_ylabel("share of tokens revealed")
    axes[0].legend(frameon=False)
    save(figure, "revealed.png")


if __name__ == "__main__":
    draw_schedules()
    draw_changes()
    draw_revealed()
