import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vqd_jax.diffusion import rules, sampler, schedule, transition

jax.config.update("jax_numpy_rank_promotion", "raise")


def gumbel_max(log_p, uniform):
    """The draw that the golden chains record: classes second, float32 logs."""
    u = np.moveaxis(uniform, -2, -1).astype(np.float64)
    log_p = np.asarray(log_p, np.float64)
    return np.argmax(log_p - np.log(-np.log(u[..., : log_p.shape[-1]] + 1e-30) + 1e-30), -1)


def golden_network(g):
    """log p0 [B, N, K] of the network that golden/sampling.npz describes."""

    def predict(tokens, t, condition="cond"):
        bias = g[condition] if condition == "cond" else g["null"][None]
        logits = g["table"][t].T[None] + g["emb"][tokens] + np.moveaxis(bias, -2, -1)
        return jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))

    return predict


posteriors = jax.jit(
    jax.vmap(
        jax.vmap(transition.posterior, in_axes=(0, 0, None, None, None)),
        in_axes=(0, 0, None, None, None),
    )
)


@pytest.mark.parametrize("name", ["fast2", "fast3", "fast4", "fast_cfg_trunc"])
def test_golden_published_fast(golden, name):
    g = golden("sampling")
    num_codes, predict = int(g["K"]), golden_network(g)
    noise_schedule = schedule.released(int(g["T"]), num_codes)
    settings = sampler.published_fast(3 if "cfg" in name else int(name[-1]), noise_schedule)
    times = settings.times[:0:-1]
    np.testing.assert_array_equal(times, g[f"{name}_t"] + 1)
    tokens = np.full(g[f"{name}_tokens"].shape[1:], num_codes)
    for i, time in enumerate(times):
        t = int(settings.rule.posterior_time(time))
        assert t == g[f"{name}_posterior_t"][i] + 1
        log_x0 = predict(tokens, time - 1)
        if "cfg" in name:
            null = predict(tokens, time - 1, "null")
            log_x0 = sampler.guide(log_x0, null, g[f"{name}_scale"])
            log_x0 = sampler.truncate(log_x0, g[f"{name}_rate"])
        log_p = posteriors(log_x0, tokens, t - 1, t, noise_schedule)
        tokens = gumbel_max(log_p, g[f"{name}_uniform"][i])
        np.testing.assert_array_equal(tokens, g[f"{name}_tokens"][i])


def test_golden_chain_from_a_noised_image(golden):
    g = golden("sampling")
    num_codes, predict, start = int(g["K"]), golden_network(g), int(g["filter_start"])
    noise_schedule = schedule.released(int(g["T"]), num_codes)
    marginal = jax.vmap(jax.vmap(transition.marginal, in_axes=(0, None, None)), (0, None, None))
    onehot = jnp.where(jax.nn.one_hot(g["filter_x0"], num_codes) > 0, 0.0, transition.LOG_ZERO)
    log_p = marginal(onehot, start, noise_schedule)
    for i in range(start + 1):
        tokens = gumbel_max(log_p, g["filter_uniform"][i])
        np.testing.assert_array_equal(tokens, g["filter_tokens"][i])
        t = start - i
        if t:
            log_p = posteriors(predict(tokens, t - 1), tokens, t - 1, t, noise_schedule)


@pytest.mark.parametrize("name", ["rule1", "rule2", "rule2w", "rule2w_cfg_trunc"])
def test_golden_high_quality_and_purity(golden, name):
    g = golden("sampling")
    num_codes, predict = int(g["K"]), golden_network(g)
    weight = float(g[f"{name}_weight"])
    for i, t in enumerate(g[f"{name}_t"]):
        before, after = g[f"{name}_tokens_before"][i], g[f"{name}_tokens_after"][i]
        log_x0 = predict(before, t)
        if "cfg" in name:
            scale, rate = g[f"{name}_guidance"], g[f"{name}_trunc"]
            log_x0 = sampler.guide(log_x0, predict(before, t, "null"), scale)
            log_x0 = sampler.truncate(log_x0, rate)
        if t == 0:
            # The last step draws every token from p0.
            tokens = gumbel_max(log_x0, g[f"{name}_uniform"][i])
            np.testing.assert_array_equal(tokens, after)
            continue
        if "2" in name:
            # The published scores come from p0 before it is renormalised after truncation.
            raw = np.moveaxis(g[f"{name}_log_p0"][i], -2, -1) if "w" in name else log_x0
            score = jax.vmap(rules.purity)(jnp.asarray(raw))
            weights = np.where(before == num_codes, score, 0)
            np.testing.assert_allclose(weights, g[f"{name}_weights"][i], atol=5e-6)
            log_x0 = jax.vmap(rules.sharpen)(log_x0, weight * score)
        candidates = gumbel_max(log_x0, g[f"{name}_uniform"][i])
        np.testing.assert_array_equal(candidates, g[f"{name}_candidates"][i])
        selected = g[f"{name}_selected"][i].astype(bool)
        for image in range(len(before)):
            # With their positions on top, and as many as they took, our tokens are theirs.
            count = int(selected[image].sum())
            masked = int((before[image] == num_codes).sum())
            keep = np.array([1.0, 1 - (masked - count) / masked, 0.0])
            step = rules.Step(s=1, t=2, start=2, num_masked=masked)
            ours = rules.reveal(
                jnp.asarray(before[image]),
                jnp.asarray(candidates[image]),
                jnp.asarray(selected[image], jnp.float32),
                step,
                schedule.from_tables(keep, 1 - keep, num_codes),
            )
            expected = after[image] if count else before[image]
            np.testing.assert_array_equal(ours, expected)


def chain(rule, count, num_tokens, noise_schedule, network, **settings):
    keys = jax.random.split(jax.random.key(0), count)
    settings = sampler.Settings(rule=rule, trajectory=True, **settings)
    run = jax.jit(
        lambda keys, settings: sampler.sample(
            keys, network, (count, num_tokens), noise_schedule, settings
        )
    )
    return jax.tree.map(np.asarray, run(keys, settings))


def flat(num_codes):
    return lambda tokens, time: jnp.full((*tokens.shape, num_codes), -jnp.log(float(num_codes)))


REVEALING = [
    rules.HighQuality(), rules.Purity(0.5), rules.Confidence(), rules.Halton((4, 8)),
    rules.Moment(),
]  # fmt: skip


@pytest.mark.parametrize("rule", REVEALING, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(
    "num_steps",
    [pytest.param(1, marks=pytest.mark.slow), 7, pytest.param(50, marks=pytest.mark.slow)],
)
def test_budgets_sum_to_the_number_of_tokens(rule, num_steps):
    noise_schedule = schedule.released(50, 5)
    result = chain(rule, 3, 32, noise_schedule, flat(5), num_steps=num_steps)
    masked = (result.trajectory == 5).sum(-1)
    assert (masked[-1] == 0).all()
    times = sampler.step_times(num_steps, noise_schedule)
    # As many masks as the schedule has at that time, up to rounding.
    nominal = 32 * noise_schedule.mask[times[1:]] / noise_schedule.mask[50]
    assert (np.abs(masked - nominal[:, None]) <= 0.501).all()
    # No token changes after it was revealed, but in the last step of the published rules.
    until = -1 if isinstance(rule, rules.HighQuality | rules.Purity) else None
    steps = result.trajectory[:until]
    visible = steps[:-1] < 5
    np.testing.assert_array_equal(steps[1:][visible], steps[:-1][visible])


def test_order_of_published_budgets():
    # T = 100 and N = 1024: 10 or 11 tokens at every step, as in the published table.
    noise_schedule = schedule.released(100, 5)
    result = chain(rules.HighQuality(), 1, 1024, noise_schedule, flat(5))
    masked = np.concatenate([[1024], (result.trajectory[:, 0] == 5).sum(-1)])
    assert set(-np.diff(masked)[:-1]) <= {10, 11}


@pytest.mark.parametrize("rule", REVEALING, ids=lambda rule: type(rule).__name__)
def test_several_calls_share_a_step(rule):
    noise_schedule, count, num_tokens = schedule.released(10, 5), 2, 32
    shared = chain(rule, count, num_tokens, noise_schedule, flat(5), calls_per_step=3)
    masked = (shared.trajectory == 5).sum(-1)
    assert shared.trajectory.shape == (30, count, num_tokens)
    # Thirds of the steps of the schedule, up to rounding.
    nominal = np.interp(np.arange(1, 31) / 3, np.arange(11), noise_schedule.mask[::-1])
    nominal = num_tokens * nominal / noise_schedule.mask[10]
    assert (np.abs(masked - nominal[:, None]) <= 0.501).all()
    until = -1 if rule.redraws_last else None
    steps = shared.trajectory[:until]
    visible = steps[:-1] < 5
    np.testing.assert_array_equal(steps[1:][visible], steps[:-1][visible])


def test_two_calls_for_each_step_are_the_published_half_speed():
    # "time0.5": at most 5 tokens a call (6, where one would be left), about 200 calls.
    result = chain(
        rules.HighQuality(), 1, 1024, schedule.released(100, 5), flat(5), calls_per_step=2
    )
    masked = np.concatenate([[1024], (result.trajectory[:, 0] == 5).sum(-1)])
    assert len(result.trajectory) == 200
    # At time 1 no token is masked any more; its calls draw all tokens anew.
    assert set(-np.diff(masked)[:-2]) <= {5, 6}


def test_confidence_reveals_the_surest_tokens_first():
    peak = jnp.array([0.9999, 0.99, 0.99999, 0.999])
    log_x0 = jnp.log(jnp.stack([peak, 1 - peak], -1))
    noise_schedule = schedule.linear(4, 2, keep=(0.75, 0.0), mask=(0.25, 1.0))
    result = chain(
        rules.Confidence(temperature=0.0), 1, 4, noise_schedule,
        lambda tokens, time: jnp.broadcast_to(log_x0, (1, 4, 2)),
    )  # fmt: skip
    order = [int(np.argmax(result.trajectory[:, 0, n] < 2)) for n in range(4)]
    assert order == [1, 3, 0, 2]


def test_random_order_is_uniform_and_purity_prefers_sharp_tokens():
    noise_schedule = schedule.linear(4, 2, keep=(0.75, 0.0), mask=(0.25, 1.0))
    peak = jnp.array([0.9, 0.6, 0.6, 0.6])
    log_x0 = jnp.log(jnp.stack([peak, 1 - peak], -1))
    network = lambda tokens, time: jnp.broadcast_to(log_x0[None], (*tokens.shape, 2))  # noqa: E731
    count = 8000
    for rule, p in [(rules.HighQuality(), np.full(4, 0.25)), (rules.Purity(), peak / peak.sum())]:
        first = chain(rule, count, 4, noise_schedule, network).trajectory[0] < 2
        np.testing.assert_array_equal(first.sum(1), 1)
        p = np.asarray(p, np.float64)
        assert stats.chisquare(first.sum(0), p / p.sum() * count).pvalue > 1e-4


def test_purity_sharpens_with_its_weight():
    log_x0 = jnp.log(jnp.array([[0.6, 0.4], [0.9, 0.1]]))
    np.testing.assert_allclose(rules.purity(log_x0), [0.6 / 0.9, 1.0], rtol=1e-6)
    sharp = np.exp(rules.sharpen(log_x0, jnp.array([1.0, 0.0])))
    np.testing.assert_allclose(sharp, [[0.36 / 0.52, 0.16 / 0.52], [0.9, 0.1]], rtol=1e-5)


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (3, 7), (32, 32)])
def test_halton_order_meets_every_token_once(grid):
    rank = rules.halton_rank(*grid)
    np.testing.assert_array_equal(np.sort(rank), np.arange(grid[0] * grid[1]))


def test_halton_order_is_spread_out():
    # The first points in bases 2 and 3: (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9).
    order = np.argsort(rules.halton_rank(8, 9))
    np.testing.assert_array_equal(order[:4], [4 * 9 + 3, 2 * 9 + 6, 6 * 9 + 1, 1 * 9 + 4])
    # Of the first 64 tokens of a 32 x 32 grid every 4 x 4 block of 8 x 8 tokens has 2 to 6.
    first = np.argsort(rules.halton_rank(32, 32))[:64]
    blocks = np.bincount(first // 32 // 8 * 4 + first % 32 // 8, minlength=16)
    assert blocks.min() >= 2
    assert blocks.max() <= 6


def test_published_fast_reveals_late_and_at_once():
    # Shares of section 1.10 of the description of the published system.
    noise_schedule = schedule.released(100, 5)
    for speed, largest, at, middle, masked_there in [
        (3, 0.279, 3, 49, 0.78),
        (5, 0.356, 0, 49, 0.87),
        (10, 0.664, 0, 49, 0.93),
    ]:
        settings = sampler.published_fast(speed, noise_schedule)
        result = chain(settings.rule, 40, 1024, noise_schedule, flat(5), times=settings.times)
        masked = np.concatenate([[1.0], (result.trajectory == 5).mean((1, 2))])
        called = np.array(settings.times[:0:-1]) - 1
        revealed = -np.diff(masked)
        np.testing.assert_allclose(revealed.max(), largest, atol=0.01)
        assert called[revealed.argmax()] == at
        seen = masked[:-1][np.abs(called - middle).argmin()]
        np.testing.assert_allclose(seen, masked_there, atol=0.02)


def test_published_fast_speeds():
    noise_schedule = schedule.released(100, 5)
    calls = {2: 51, 3: 34, 4: 26, 5: 21, 8: 14, 10: 11}
    for speed, count in calls.items():
        assert len(sampler.published_fast(speed, noise_schedule).times) == count + 1
    for speed in (1, 101):
        with pytest.raises(ValueError, match=rf"speed must lie in 2\.\.100 \(T\), got {speed}"):
            sampler.published_fast(speed, noise_schedule)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_remasking_keeps_the_marginals(tables, strength):
    _, mask = tables
    noise_schedule = schedule.from_tables(*tables, 4)
    times = np.arange(1, 6)
    hide, b = rules.remasking_bridge(times - 1, times, strength, noise_schedule)
    kept = mask[1:] * np.asarray(b.stay_masked) + (1 - mask[1:]) * np.asarray(hide)
    np.testing.assert_allclose(kept, mask[:-1], atol=1e-6)
    assert (np.asarray(hide) >= 0).all()
    assert (np.asarray(hide) <= 1).all()


@pytest.mark.parametrize(
    ("make", "start", "share"),
    [
        pytest.param(schedule.released, "schedule", 0.5, marks=pytest.mark.slow),
        pytest.param(schedule.paper, "schedule", 0.0, marks=pytest.mark.slow),
        (schedule.paper, "schedule", 0.5),
        (schedule.paper, "masked", 0.5),
    ],
)
def test_remasking_keeps_the_marginals_beside_known_codes(make, start, share):
    num_codes, count, num_tokens = 4, 100, 256
    noise_schedule = make(20, num_codes)
    known = np.full((count, num_tokens), num_codes)
    known[:, : int(share * num_tokens)] = 1

    def shares(strength):
        result = chain(
            rules.Remask(strength), count, num_tokens, noise_schedule, flat(num_codes),
            known=known, start=start,
        )  # fmt: skip
        masked = result.trajectory[:, :, int(share * num_tokens) :] == num_codes
        return masked, masked.mean((1, 2))

    began = noise_schedule.mask[20] if start == "schedule" else 1.0
    first = int(sampler.masked_time(1 - share, noise_schedule))
    times = sampler.even_times(first, 20)[1:]
    expected = began * noise_schedule.mask[times] / noise_schedule.mask[first]
    masked, ours = shares(1.0)
    np.testing.assert_allclose(ours, expected, atol=0.015)
    np.testing.assert_allclose(shares(0.0)[1], expected, atol=0.015)
    assert (~masked[:-1] & masked[1:]).any()


def test_remasked_chain_has_the_marginals_and_hides_tokens():
    num_codes = 4
    # Masks and replaced codes, and all masked at the end, where chains begin.
    noise_schedule = schedule.linear(6, num_codes, keep=(0.85, 1e-6), mask=(0.05, 0.99999))
    truth = jnp.where(jnp.arange(num_codes) == 2, 0.0, transition.LOG_ZERO)
    marginals = jax.vmap(transition.marginal, in_axes=(None, 0, None))
    exact = np.exp(marginals(truth, np.arange(5, -1, -1), noise_schedule))
    for strength in (0.0, 0.5):
        steps = chain(
            rules.Remask(strength), 500, 64, noise_schedule,
            lambda tokens, time: jnp.broadcast_to(truth, (*tokens.shape, num_codes)),
        ).trajectory  # fmt: skip
        shares = np.stack([(steps == x).mean((1, 2)) for x in range(num_codes + 1)], 1)
        np.testing.assert_allclose(shares, exact, atol=0.01)
        hidden = ((steps[:-1] < num_codes) & (steps[1:] == num_codes)).any()
        assert hidden == (strength > 0)
        assert (steps[-1] == 2).all()


def test_flow_keeps_the_law_of_a_token_and_ties_pictures_to_their_first_tokens():
    # One token whose law is known: the network is the exact posterior.
    data, keep, count = np.array([0.6, 0.3, 0.1]), np.array([1.0, 0.7, 0.4, 0.0]), 20_000
    noise_schedule = schedule.from_tables(keep, 0.25 * (1 - keep), 3)
    noise = np.array([0.25, 0.25, 0.25, 0.25])  # of the codes and the mask, at every time
    seen = keep[:, None, None] * np.eye(4)[:3] + (1 - keep)[:, None, None] * noise
    joint = data[None, :, None] * seen  # [time, clean, shown]
    joint /= np.maximum(joint.sum(1, keepdims=True), 1e-9)
    posterior = jnp.log(jnp.asarray(joint, jnp.float32) + 1e-30)

    def network(tokens, time):
        return posterior[time[:, None], :, tokens]

    result = chain(rules.Flow(), count, 1, noise_schedule, network)
    for step, time in enumerate((2, 1, 0)):
        found = np.bincount(result.trajectory[step].ravel(), minlength=4)
        law = (data @ seen[time])[: 4 if time else 3]
        assert stats.chisquare(found[: len(law)], law * count).pvalue > 1e-4
    # From time 2 to 1 half of the noise ends: a token is drawn from the posterior, or stays.
    before, after = result.trajectory[0, :, 0], result.trajectory[1, :, 0]
    for shown in range(4):
        law = 0.5 * np.append(joint[2, :, shown], 0) + 0.5 * np.eye(4)[shown]
        found = np.bincount(after[before == shown], minlength=4)
        assert found[law == 0].sum() == 0
        assert stats.chisquare(found[law > 0], (law * found.sum())[law > 0]).pvalue > 1e-4
