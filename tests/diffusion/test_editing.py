import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqd_jax.diffusion import rules, sampler, schedule

jax.config.update("jax_numpy_rank_promotion", "raise")

NUM_CODES, NUM_TOKENS, NUM_STEPS = 6, 16, 8
SCHEDULE = schedule.paper(NUM_STEPS, NUM_CODES)
RULES = [
    rules.Ancestral(),
    rules.PublishedFast(1),
    rules.Remask(0.5),
    rules.HighQuality(),
    rules.Purity(1.0),
    rules.Confidence(),
    rules.Halton((4, 4)),
    rules.Moment(),
]


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def network(tokens, time):
    """Draws mostly code 5, whatever is there."""
    del time
    return jax.nn.log_softmax(jax.nn.one_hot(jnp.full(tokens.shape, 5), NUM_CODES) * 4.0)


@jax.jit
def run(image_keys, settings):
    shape = (len(image_keys), NUM_TOKENS)
    return sampler.sample(image_keys, network, shape, SCHEDULE, settings)


def half_known():
    known = np.full((3, NUM_TOKENS), NUM_CODES, np.int32)
    known[0, :8] = np.arange(8) % 4
    known[1, ::4] = 2
    known[2] = 1
    return known


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("times", [pytest.param(None, marks=pytest.mark.slow), (0, 2, 3, 8)])
def test_known_codes_never_change(rule, times):
    known = half_known()
    settings = sampler.Settings(rule=rule, known=known, trajectory=True, times=times)
    result = run(keys(3), settings)
    for tokens in [*result.trajectory, result.codes]:
        np.testing.assert_array_equal(np.where(known < NUM_CODES, tokens, NUM_CODES), known)
    assert (np.asarray(result.codes) < NUM_CODES).all()
    # What was to be found is the network's.
    found = np.asarray(result.codes)[known == NUM_CODES]
    assert (found == 5).mean() > 0.75


@pytest.mark.slow
def test_an_image_with_known_codes_starts_where_its_share_is_masked():
    asked = []

    def record(tokens, time):
        jax.debug.callback(lambda time: asked.append(np.asarray(time)), time)
        return network(tokens, time)

    settings = sampler.Settings(known=half_known(), num_steps=4)
    sampler.sample(keys(3), record, (3, NUM_TOKENS), SCHEDULE, settings)
    jax.effects_barrier()
    # Masked shares 1/2, 3/4 and 0 of a schedule with (t - 1) / 7 of its masks at time t.
    times = np.stack(sorted(asked, key=lambda t: -t.sum()))
    np.testing.assert_array_equal(times.T, [[5, 4, 3, 2], [7, 6, 4, 2], [1, 1, 1, 1]])
    mask = np.asarray(SCHEDULE.mask)
    share = np.linspace(0, 1, 33)
    first = np.asarray(sampler.masked_time(share, SCHEDULE))
    assert (mask[first] >= share * mask[-1] - 1e-6).all()
    assert (mask[first - 1] < share * mask[-1] + 1e-6)[share > 0].all()
    assert first[-1] == NUM_STEPS


@pytest.mark.parametrize("rule", RULES[:2], ids=lambda rule: type(rule).__name__)
def test_steps_that_change_nothing_call_no_network(rule):
    asked = []

    def record(tokens, time):
        jax.debug.callback(lambda time: asked.append(np.asarray(time)), time)
        return network(tokens, time)

    @jax.jit
    def sample(settings):
        return sampler.sample(keys(3), record, (3, NUM_TOKENS), SCHEDULE, settings)

    initial = np.full((3, NUM_TOKENS), 3, np.int32)
    settings = sampler.Settings(rule=rule, initial=initial, strength=0.5, trajectory=True)
    result = sample(settings)
    jax.effects_barrier()
    # All of eight steps are there, of which every other one is a call.
    np.testing.assert_array_equal(np.sort(asked, axis=0), np.tile([[1], [2], [3], [4]], 3))
    np.testing.assert_array_equal(result.trajectory[1::2], [*result.trajectory[2::2], result.codes])
    np.testing.assert_array_equal(result.predictions[::2], result.predictions[1::2])


@pytest.mark.slow
def test_images_that_begin_at_different_times_rest_one_by_one():
    # The second image takes no step before its time, whatever the first one does.
    known = half_known()[:2]
    settings = sampler.Settings(rule=rules.PublishedFast(1), known=known, trajectory=True)
    alone = run(keys(2)[1:], settings.replace(known=known[1:]))
    together = run(keys(2), settings)
    np.testing.assert_array_equal(together.trajectory[:, 1:], alone.trajectory)
    times = sampler.even_times(int(sampler.masked_time(0.5, SCHEDULE)), NUM_STEPS)
    for step in np.flatnonzero(np.diff(times) == 0)[1:]:
        before, after = together.trajectory[step - 1 : step + 1, 0]
        np.testing.assert_array_equal(before, after)


def copying_network(tokens, time):
    """Sure that every visible token is right, and that every mask hides code 5."""
    del time
    code = jnp.where(tokens < NUM_CODES, tokens, 5)
    return jax.nn.log_softmax(jax.nn.one_hot(code, NUM_CODES) * 30.0)


@jax.jit
def edited(image_keys, settings):
    shape = (len(image_keys), NUM_TOKENS)
    return sampler.sample(image_keys, copying_network, shape, SCHEDULE, settings)


@pytest.mark.parametrize(
    ("strength", "time"),
    [pytest.param(0.01, 1, marks=pytest.mark.slow), (0.125, 1), (0.5, 4), (1.0, 8)],
)
def test_strength_decides_what_is_left_of_an_image(strength, time):
    count = 1000
    settings = sampler.Settings(
        initial=jnp.zeros((count, NUM_TOKENS), jnp.int32), strength=strength, num_steps=1
    )
    codes = edited(keys(count), settings).codes
    shares = np.bincount(np.asarray(codes).ravel(), minlength=NUM_CODES) / codes.size
    exact = np.full(NUM_CODES, SCHEDULE.replace[time])
    exact[0] += SCHEDULE.keep[time]
    exact[5] += SCHEDULE.mask[time]
    np.testing.assert_allclose(shares, exact, atol=0.015)


def test_a_strength_changes_no_program():
    settings = sampler.Settings(initial=np.zeros((3, NUM_TOKENS), np.int32), num_steps=3)
    before = run._cache_size()
    for strength in (0.2, 0.4, 0.9):
        run(keys(3), settings.replace(strength=strength))
    assert run._cache_size() == before + 1


def test_known_and_initial_together():
    known = half_known()
    initial = np.full((3, NUM_TOKENS), 3, np.int32)
    settings = sampler.Settings(known=known, initial=initial, strength=0.5, trajectory=True)
    result = run(keys(3), settings)
    for tokens in result.trajectory:
        np.testing.assert_array_equal(np.where(known < NUM_CODES, tokens, NUM_CODES), known)


def test_an_edited_image_depends_on_its_own_key_only():
    settings = sampler.Settings(known=half_known(), rule=rules.Purity(0.5))
    together = run(keys(3), settings)
    alone = run(keys(3)[1:2], settings.replace(known=half_known()[1:2]))
    np.testing.assert_array_equal(alone.codes[0], together.codes[1])


# A batch that shares a key shows in one rule of each kind, so the others are slow tests.
@pytest.mark.parametrize(
    "rule",
    [
        rule
        if isinstance(rule, rules.Ancestral | rules.Remask | rules.Halton)
        else pytest.param(rule, marks=pytest.mark.slow)
        for rule in RULES
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_every_rule_depends_on_the_own_key_only(rule):
    settings = sampler.Settings(rule=rule, num_steps=3)
    together = run(keys(3), settings)
    for image in (0, 2):
        alone = run(keys(3)[image : image + 1], settings)
        np.testing.assert_array_equal(alone.codes[0], together.codes[image])


@pytest.mark.slow
def test_predictions_are_the_likeliest_codes():
    result = run(keys(2), sampler.Settings(num_steps=3, trajectory=True))
    assert result.predictions.shape == result.trajectory.shape == (3, 2, NUM_TOKENS)
    np.testing.assert_array_equal(result.predictions, 5)
    plain = run(keys(2), sampler.Settings(num_steps=3))
    assert plain.trajectory is None
    assert plain.predictions is None
    np.testing.assert_array_equal(plain.codes, result.codes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"times": (1, 5, 8)}, "increasing list that begins with 0"),
        ({"times": (0, 5, 5)}, "increasing list that begins with 0"),
        ({"times": (0,)}, "increasing list that begins with 0"),
        ({"times": (0, 5, 9)}, "times end at 9, after the schedule's T=8"),
        ({"times": (0, 5), "num_steps": 2}, "either num_steps or times"),
    ],
)
def test_impossible_times(settings, message):
    with pytest.raises(ValueError, match=message):
        run(keys(1), sampler.Settings(**settings))


def scaled_network(tokens, time):
    """Prefers code 1 with the condition and code 2 without, as odd ones of four rows are."""
    del time
    rows = jnp.arange(tokens.shape[0])
    null = (rows % 2 == 1) & (len(tokens) == 4)
    code = jnp.where(null, 2, 1)[:, None] * jnp.ones_like(tokens)
    return jax.nn.log_softmax(jax.nn.one_hot(code, NUM_CODES) * 3.0)


@jax.jit
def guided(guidance):
    settings = sampler.Settings(num_steps=4, guidance=guidance, trajectory=True)
    return sampler.sample(keys(2), scaled_network, (2, NUM_TOKENS), SCHEDULE, settings)


@pytest.mark.slow
def test_a_list_of_scales_is_the_scale_of_every_step():
    constant = guided(2.5)
    listed = guided(np.full(4, 2.5, np.float32))
    np.testing.assert_array_equal(constant.codes, listed.codes)
    # Scale 0 asks the null network, and scale 1 the conditional one.
    mixed = guided(np.array([0, 0, 1, 1], np.float32))
    np.testing.assert_array_equal(mixed.predictions[:2], 2)
    np.testing.assert_array_equal(mixed.predictions[2:], 1)


def test_no_null_pass_outside_the_interval():
    rows = []

    def count(tokens, time):
        jax.debug.callback(lambda t: rows.append(len(t)), time)
        return scaled_network(tokens, time)

    scales = sampler.interval(3.0, 4, 0.25, 0.75)
    np.testing.assert_array_equal(scales, [1, 3, 3, 1])
    settings = sampler.Settings(num_steps=4, guidance=scales)
    sampler.sample(keys(2), count, (2, NUM_TOKENS), SCHEDULE, settings)
    jax.effects_barrier()
    assert sorted(rows) == [2, 2, 4, 4]


def test_ramp():
    np.testing.assert_allclose(sampler.ramp(5.0, 5), [1, 2, 3, 4, 5])


def test_top_k():
    p = jnp.array([[0.5, 0.2, 0.15, 0.1, 0.05], [0.1, 0.1, 0.6, 0.15, 0.05]])
    for k in (1, 2, 3, 5):
        kept = np.exp(sampler.keep_top_k(jnp.log(p), k))
        for row, ours in zip(np.asarray(p), kept, strict=True):
            exact = np.where(row >= np.sort(row)[-k], row, 0)
            np.testing.assert_allclose(ours, exact / exact.sum(), atol=1e-6)
    settings = sampler.Settings(top_k=1)
    np.testing.assert_array_equal(run(keys(2), settings).codes, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "^temperature=0: must be positive"),
        ({"temperature": float("nan")}, "^temperature=nan"),
        ({"truncation": 1.5}, "^truncation=1.5: must lie above 0 and up to 1"),
        ({"truncation": np.float32(0)}, "^truncation=0.0"),
        ({"top_k": 0}, "^top_k=0: must be at least 1"),
        ({"guidance": np.array([1, -1])}, "^guidance="),
        ({"strength": 0.0}, "^strength=0.0"),
        ({"start": "noise"}, "^start='noise': must be schedule or masked"),
        ({"start": "schedule", "rule": rules.Purity()}, "Purity takes no noise back"),
    ],
)
def test_impossible_settings_are_refused_when_they_are_made(settings, message):
    with pytest.raises(ValueError, match=message):
        sampler.Settings(**settings)
    with pytest.raises(ValueError, match=message):
        sampler.Settings().replace(**settings)
