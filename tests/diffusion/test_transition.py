import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vqd_jax.diffusion import schedule, transition

jax.config.update("jax_numpy_rank_promotion", "raise")


def log(p):
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(p), transition.LOG_ZERO).astype(np.float32)


posteriors = jax.jit(jax.vmap(transition.posterior, in_axes=(0, 0, 0, 0, None)))
marginals = jax.jit(jax.vmap(transition.marginal, in_axes=(0, 0, None)))
draws_of_q = jax.jit(jax.vmap(transition.q_sample, in_axes=(0, None, None, None)))
draws_of_posterior = jax.jit(
    jax.vmap(transition.draw_posterior, in_axes=(0, None, None, None, None, None))
)


@pytest.mark.parametrize("num_codes", [2, 6])
def test_marginal_is_the_matrix_product(tables, matrices, code_distributions, num_codes):
    explicit = matrices(*tables, num_codes)
    p0 = code_distributions(num_codes)
    times = np.arange(explicit.num_steps + 1)
    ours = marginals(
        log(np.tile(p0, (len(times), 1))),
        np.repeat(times, len(p0)),
        schedule.from_tables(*tables, num_codes),
    )
    exact = np.concatenate([p0 @ explicit.between(0, t)[:, :num_codes].T for t in times])
    np.testing.assert_allclose(np.exp(ours), exact, atol=1e-6)


@pytest.mark.parametrize("num_codes", [2, 6])
def test_posterior_is_the_matrix_product(tables, matrices, code_distributions, num_codes):
    explicit = matrices(*tables, num_codes)
    cases = [
        (p0, x_t, s, t)
        for t in range(1, explicit.num_steps + 1)
        for s in range(t)
        for x_t in range(num_codes + 1)
        for p0 in code_distributions(num_codes)
    ]
    p0, x_t, s, t = (np.stack(x) for x in zip(*cases, strict=True))
    ours = np.exp(posteriors(log(p0), x_t, s, t, schedule.from_tables(*tables, num_codes)))
    asked = 0
    for case, p in zip(cases, ours, strict=True):
        p0, x_t, s, t = case
        # Nothing to compare where neither p0 nor noise can have made x_t.
        if any(explicit.can_be(x_t, t, k) for k in np.flatnonzero(p0)):
            asked += 1
            np.testing.assert_allclose(p, explicit.posterior(*case), atol=1e-6, err_msg=str(case))
            if s == 0 and explicit.between(0, t)[0, 1] > 1e-15:
                # At time 0 it is p0, unless a visible token is certain (nothing is replaced).
                np.testing.assert_allclose(p[:num_codes], p0, atol=1e-6, err_msg=str(case))
    assert asked > 100


@pytest.mark.parametrize("t", [1, 2, 500, 999, 1000])
def test_posterior_of_a_thousand_small_steps(t):
    # Every coefficient of a step is a difference of nearly equal numbers.
    num_codes, num_steps, s = 5, 1000, t - 1
    p0 = np.array([0.5, 0.2, 0.1, 0.15, 0.05])
    ends = (0.99999, 0.000009), (0.000009, 0.9)
    keep, mask = (
        np.concatenate([[clean], np.linspace(*x, num_steps)])
        for clean, x in zip((1, 0), ends, strict=True)
    )
    replace = (1 - keep - mask) / num_codes
    ours = posteriors(
        log(np.stack([p0, p0])),
        np.array([num_codes, 2]),
        np.full(2, s),
        np.full(2, t),
        schedule.paper(num_steps, num_codes),
    )
    unmasked = (mask[t] - mask[s]) / mask[t] * (keep[s] * p0 + replace[s]) / (1 - mask[s])
    unmasked = np.append(unmasked, mask[s] / mask[t])
    np.testing.assert_allclose(np.exp(ours[0]), unmasked, atol=1e-6)
    stay = keep[t] / keep[s]
    step = stay * np.eye(num_codes) + (replace[t] - stay * replace[s]) / (1 - mask[s])
    over = p0 / (keep[t] * np.eye(num_codes)[2] + replace[t])
    shown = step[2] * (keep[s] * over + replace[s] * over.sum())
    np.testing.assert_allclose(np.exp(ours[1]), np.append(shown, 0), atol=1e-6)


def test_golden_transition(golden):
    g = golden("transition")
    num_codes = int(g["K"])
    noise_schedule = schedule.released(int(g["T"]), num_codes)
    t = g["t"] + 1
    rows = lambda x: x.transpose(0, 2, 1)  # noqa: E731

    def compare(ours, theirs, classes=slice(None)):
        ours, theirs = np.asarray(ours)[..., classes], rows(theirs)[..., classes]
        np.testing.assert_allclose(np.exp(ours), np.exp(theirs), atol=5e-6)
        sure = theirs > -60
        np.testing.assert_allclose(ours[sure], theirs[sure], atol=2e-5)

    marginal = jax.vmap(
        jax.vmap(transition.marginal, in_axes=(0, None, None)), in_axes=(0, 0, None)
    )
    onehot = log(np.eye(num_codes)[g["x0"]])
    network = rows(g["log_p0"])[..., :num_codes]
    compare(marginal(onehot, t, noise_schedule), g["log_q_xt_given_x0"])
    compare(marginal(network, t, noise_schedule), g["log_q_xt_given_p0"])

    over_tokens = jax.vmap(transition.posterior, in_axes=(0, 0, None, None, None))
    posterior = jax.jit(jax.vmap(over_tokens, in_axes=(0, 0, 0, 0, None)))
    # The published code gives the mask row of a visible token an artificial floor, e^-69 times a
    # likelihood; here it is impossible. The logarithms are compared for the codes.
    codes = slice(0, num_codes)
    for p0, theirs in ((network, "posterior_network"), (onehot, "posterior_onehot")):
        ours = posterior(p0, g["x_t"], t - 1, t, noise_schedule)
        compare(ours, g[theirs], codes)
        np.testing.assert_allclose(
            np.exp(ours[..., num_codes]), np.exp(g[theirs][:, num_codes]), atol=5e-6
        )
    exact = np.exp(rows(g["posterior_network_f64"]))
    ours = np.exp(posterior(network, g["x_t"], t - 1, t, noise_schedule))
    np.testing.assert_allclose(ours, exact, atol=1e-6)


@pytest.mark.parametrize("process", ["released", "paper"])
def test_golden_strided_posterior(golden, process):
    g = golden("strided_posterior")
    keep_first, keep_last, mask_first, mask_last = g[f"{process}_endpoints"]
    noise_schedule = schedule.linear(
        int(g["T"]), int(g["K"]), (keep_first, keep_last), (mask_first, mask_last)
    )
    for (t, s), exact in zip(g["pairs"] + 1, g[f"{process}_posterior"], strict=True):
        count = len(g["x_t"])
        ours = posteriors(
            log(g["p0"]), g["x_t"], np.full(count, s), np.full(count, t), noise_schedule
        )
        np.testing.assert_allclose(np.exp(ours), exact, atol=1e-6)


def chi_square(draws, p):
    """p-value of draws from the distribution p; impossible values must not occur."""
    counts = np.bincount(np.asarray(draws).ravel(), minlength=len(p))
    assert len(counts) == len(p)
    assert not counts[p == 0].any()
    possible = p > 0
    if possible.sum() == 1:
        return 1.0
    return stats.chisquare(counts[possible], counts.sum() * p[possible] / p.sum()).pvalue


def test_q_sample_has_the_marginal_law(tables, matrices):
    num_codes, draws = 4, 50_000
    explicit = matrices(*tables, num_codes)
    noise_schedule = schedule.from_tables(*tables, num_codes)
    keys = jax.random.split(jax.random.key(0), draws)
    for t in range(explicit.num_steps + 1):
        exact = explicit.between(0, t)[:, 1]
        exact = np.where(exact > 1e-15, exact, 0)
        assert chi_square(draws_of_q(keys, 1, t, noise_schedule), exact) > 1e-4


def test_draw_posterior_has_the_posterior_law(tables, matrices):
    num_codes, draws = 4, 50_000
    explicit = matrices(*tables, num_codes)
    noise_schedule = schedule.from_tables(*tables, num_codes)
    p0 = np.array([0.6, 0.1, 0.0, 0.3])
    keys = jax.random.split(jax.random.key(1), draws)
    for s, t in [(0, 1), (1, 2), (0, 3), (1, 3), (2, 3)]:
        for x_t in (1, 3, num_codes):
            if explicit.can_be(x_t, t):
                exact = explicit.posterior(p0, x_t, s, t)
                drawn = draws_of_posterior(keys, log(p0), x_t, s, t, noise_schedule)
                assert chi_square(drawn, np.where(exact > 1e-15, exact, 0)) > 1e-4


def _probability_of_code_0(logits, t, noise_schedule):
    return jnp.exp(transition.marginal(jax.nn.log_softmax(logits), t, noise_schedule))[0]


def _all_possible_logs(logits, x_t, s, t, noise_schedule):
    p = transition.posterior(jax.nn.log_softmax(logits), x_t, s, t, noise_schedule)
    return jnp.maximum(p, -100).sum()


marginal_gradients = jax.jit(jax.vmap(jax.grad(_probability_of_code_0), in_axes=(0, None, None)))
posterior_gradients = jax.jit(
    jax.vmap(jax.grad(_all_possible_logs), in_axes=(0, None, None, None, None))
)


def test_gradients_are_finite_at_the_edges(tables):
    num_codes = 4
    noise_schedule = schedule.from_tables(*tables, num_codes)
    last = noise_schedule.num_steps
    logits = jnp.array(
        [[1e4, -1e4, 0, 0], [-1e4, -1e4, 1e4, 1e4], [1e4, 0, 0, 0], [0, 0, 0, 0]], jnp.float32
    )
    for t in (0, 1, last):
        assert np.isfinite(marginal_gradients(logits, t, noise_schedule)).all(), t
    for s, t in [(0, 1), (0, last), (last - 1, last)]:
        for x_t in (0, 2, num_codes):
            gradients = posterior_gradients(logits, x_t, s, t, noise_schedule)
            assert np.isfinite(gradients).all(), (s, t, x_t)
