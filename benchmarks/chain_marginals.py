"""Whether chains have the masks that training showed: share of masked tokens at every time.

python benchmarks/chain_marginals.py

A chain that begins at the wrong place, or a rule that hides too few tokens, shows the network
tokens at times where training had others. Nothing fails then; pictures only get worse. This prints,
for both schedules, with and without known codes, the share of the tokens to be found that are
masked in the middle of the chain, beside the share of a chain that begins from the schedule's own
law. "All masked" is how every chain began in version 0.1.0, and ``ShareIgnored`` is how its
``remask`` counted.

It also counts the network calls of an edit at strength 0.5. No weights are needed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vqd_jax.diffusion import rules, sampler, schedule

NUM_STEPS, NUM_CODES, NUM_IMAGES, NUM_TOKENS = 100, 16, 64, 256


class ShareIgnored(rules.Remask):
    """``Remask`` as it was: the share of masks with which a chain began has no part."""

    def __call__(self, key, log_x0, tokens, step, noise_schedule):
        scale = jnp.asarray(noise_schedule.mask)[step.start]
        return super().__call__(
            key, log_x0, tokens, step._replace(masked_share=scale), noise_schedule
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """One chain: masked share in its middle, and what it should be."""

    schedule: str
    known: float
    rule: str
    start: str
    nominal: float
    found: float


def flat(tokens, time):
    """A network that knows nothing."""
    del time
    return jnp.zeros((*tokens.shape, NUM_CODES))


@jax.jit
def _trajectory(keys, settings, noise_schedule):
    shape = (len(keys), NUM_TOKENS)
    return sampler.sample(keys, flat, shape, noise_schedule, settings).trajectory


def measure(name: str, known_share: float, rule, start: str | None) -> Row:
    """The masked share in the middle of a chain of this kind."""
    noise_schedule = getattr(schedule, name)(NUM_STEPS, NUM_CODES)
    free = np.arange(NUM_TOKENS) >= known_share * NUM_TOKENS
    known = None
    if known_share:
        known = np.tile(np.where(free, NUM_CODES, 1).astype(np.int32), (NUM_IMAGES, 1))
    settings = sampler.Settings(rule=rule, trajectory=True, known=known, start=start)
    keys = jax.random.split(jax.random.key(0), NUM_IMAGES)
    tokens = np.asarray(_trajectory(keys, settings, noise_schedule))
    first = NUM_STEPS
    if known_share:
        first = int(sampler.masked_time(1 - known_share, noise_schedule))
    times = sampler.even_times(first, NUM_STEPS)
    mask, middle = np.asarray(noise_schedule.mask), NUM_STEPS // 2
    nominal = mask[-1] * mask[times[middle]] / mask[first]
    found = (tokens[middle - 1][:, free] == NUM_CODES).mean()
    started = "all masked" if start == "masked" else "schedule's law"
    return Row(name, known_share, type(rule).__name__, started, float(nominal), found)


def count_calls(strength: float) -> tuple[int, int]:
    """Steps of an edit, and how many of them call the network."""
    asked = []

    def network(tokens, time):
        jax.debug.callback(lambda time: asked.append(int(time[0])), time)
        return flat(tokens, time)

    initial = np.zeros((1, NUM_TOKENS), np.int32)
    settings = sampler.Settings(initial=initial, strength=strength)
    noise_schedule = schedule.released(NUM_STEPS, NUM_CODES)
    keys = jax.random.split(jax.random.key(0), 1)
    sampler.sample(keys, network, (1, NUM_TOKENS), noise_schedule, settings)
    jax.effects_barrier()
    return NUM_STEPS, len(asked)


def main() -> None:
    """Prints the table and the count."""
    print("| Schedule | Known codes | Rule | Start | Asked for | Found |")
    print("|---|---|---|---|---|---|")
    for name in ("released", "paper"):
        for known in (0.0, 0.5):
            for rule, start in (
                (rules.Ancestral(), "masked"),
                (rules.Ancestral(), None),
                (ShareIgnored(1.0), None),
                (rules.Remask(1.0), None),
            ):
                row = measure(name, known, rule, start)
                print(
                    f"| {row.schedule} | {row.known:.0%} | {row.rule} | {row.start} | "
                    f"{row.nominal:.3f} | {row.found:.3f} |"
                )
    steps, calls = count_calls(0.5)
    print(f"\nAn edit at strength 0.5 has {steps} steps and calls the network {calls} times.")


if __name__ == "__main__":
    main()
