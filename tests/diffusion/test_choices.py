import jax.numpy as jnp
import numpy as np
import pytest

from vqd_jax.diffusion import rules, sampler, schedule
from vqd_jax.diffusion.choices import RULES, settings

SCHEDULE = schedule.released(10, 32)
GRID = (4, 4)


def chosen(**choices):
    return settings(SCHEDULE, GRID, **choices)


def test_nothing_chosen_is_the_plain_chain():
    assert chosen() == sampler.Settings()


def test_every_choice_reaches_its_setting():
    codes = np.arange(16, dtype=np.int32)
    made = chosen(
        num_steps=4, rule="purity", guidance_scale=3.0, truncation=0.8, top_k=5, temperature=0.7,
        known=codes, initial=codes, strength=0.9, trajectory=True,
    )  # fmt: skip
    assert (made.num_steps, made.times, made.rule) == (4, None, rules.Purity(1.0))
    assert made.guidance == jnp.float32(3.0)
    assert made.truncation == jnp.float32(0.8)
    assert (made.top_k, made.temperature, made.strength) == (5, 0.7, 0.9)
    assert made.trajectory
    assert made.known is codes
    assert chosen(rule="purity", calls_per_step=2).calls_per_step == 2
    assert made.initial is codes


def test_guidance_may_change_from_step_to_step():
    ramp = chosen(num_steps=4, guidance_scale=4.0, guidance_ramp=True)
    np.testing.assert_allclose(ramp.guidance, [1, 2, 3, 4])
    some = chosen(times=[0, 2, 5, 7, 10], guidance_scale=4.0, guidance_interval=(0.25, 0.75))
    np.testing.assert_array_equal(some.guidance, [1, 4, 4, 1])
    every = chosen(guidance_scale=range(10))
    np.testing.assert_array_equal(every.guidance, np.arange(10, dtype=np.float32))
    assert chosen(guidance_scale=(3.0,)).guidance == jnp.float32(3.0)
    assert chosen(guidance_scale=1, guidance_ramp=True).guidance is None


def test_published_fast_sampling_has_its_own_times_and_rule():
    made = chosen(published_fast=3, rule="purity", truncation=0.9)
    fast = sampler.published_fast(3, SCHEDULE)
    assert (made.times, made.rule) == (fast.times, fast.rule)
    assert made.truncation == jnp.float32(0.9)


def test_a_rule_has_a_name_or_is_given():
    assert chosen(rule="halton").rule == rules.Halton(GRID)
    assert chosen(rule=rules.Purity(0.3)).rule == rules.Purity(0.3)
    assert set(RULES) >= {"ordinary", "high_quality", "purity", "confidence", "halton", "remask"}
    assert chosen(rule="moment").rule == rules.Moment()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"num_steps": 11}, "^num_steps=11: must lie in 0..10"),
        ({"num_steps": -1}, "^num_steps=-1"),
        ({"num_steps": 3, "times": (0, 1)}, "^num_steps, times, published_fast: give one"),
        ({"times": (0, 11)}, "^times end at 11"),
        ({"times": (3, 10)}, "^times must be an increasing list"),
        ({"published_fast": 1}, "speed must lie in 2..10"),
        ({"rule": "best"}, "^rule='best': must be one of ordinary"),
        ({"guidance_scale": -2.0}, "^guidance_scale=-2.0"),
        ({"guidance_scale": float("nan")}, "^guidance_scale=nan"),
        ({"guidance_scale": [1, 2]}, "there are 10 steps"),
        ({"guidance_scale": 3, "guidance_interval": (0.8, 0.2)}, "^guidance_interval"),
        ({"guidance_scale": 3, "guidance_interval": (0, 1), "guidance_ramp": True}, "^guidance"),
        ({"guidance_scale": 3, "guidance_interval": (0.5,)}, "^guidance_interval"),
        ({"truncation": 0.0}, "^truncation=0.0"),
        ({"strength": 0}, "^strength=0: must lie above 0"),
        ({"calls_per_step": 2}, "^calls_per_step=2: Ancestral does a step in one call"),
        ({"calls_per_step": 0, "rule": "purity"}, "^calls_per_step=0: must be at least 1"),
    ],
)
def test_impossible_choices_are_named(choices, message):
    with pytest.raises(ValueError, match=message):
        chosen(**choices)


def test_what_is_no_choice_is_named():
    with pytest.raises(TypeError, match="'num_inference_steps'"):
        chosen(num_inference_steps=3)
