import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vqd_jax.diffusion import chunks, objective, schedule

jax.config.update("jax_numpy_rank_promotion", "raise")

bounds = jax.jit(jax.vmap(objective.token_bound, in_axes=(0, 0, 0, 0, None)))


def log(p):
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(p), -1e30).astype(np.float32)


def divergence(q, p):
    return sum(a * np.log(a / b) for a, b in zip(q, p, strict=True) if a > 1e-15)


@pytest.mark.parametrize("num_codes", [2, 5])
def test_bound_is_the_enumerated_divergence(tables, matrices, code_distributions, num_codes):
    explicit = matrices(*tables, num_codes)
    cases, exact = [], []
    for t in range(1, explicit.num_steps + 1):
        for x_t in range(num_codes + 1):
            for x0 in range(num_codes):
                if explicit.can_be(x_t, t, x0):
                    true = explicit.posterior(np.eye(num_codes)[x0], x_t, t - 1, t)
                    # The last rows have no zeros, so that the divergence is finite.
                    for p0 in code_distributions(num_codes)[[1, 2, 4]]:
                        cases.append((p0, x0, x_t, t))
                        exact.append(divergence(true, explicit.posterior(p0, x_t, t - 1, t)))
    p0, x0, x_t, t = (np.stack(x) for x in zip(*cases, strict=True))
    ours = bounds(log(p0), x0, x_t, t, schedule.from_tables(*tables, num_codes))
    assert (np.asarray(ours) >= 0).all()
    np.testing.assert_allclose(ours, exact, rtol=2e-5, atol=1e-6)


def test_bound_is_zero_where_p0_is_the_truth(tables, matrices):
    num_codes = 4
    explicit = matrices(*tables, num_codes)
    for t in range(1, explicit.num_steps + 1):
        seen = [x for x in range(num_codes + 1) if explicit.can_be(x, t, 2)]
        count = len(seen)
        truth = np.tile(log(np.eye(num_codes)[2]), (count, 1))
        ours = bounds(
            truth, np.full(count, 2), np.array(seen), np.full(count, t),
            schedule.from_tables(*tables, num_codes),
        )  # fmt: skip
        np.testing.assert_allclose(ours, 0, atol=2e-7, err_msg=str((t, seen)))


def bound_of_logits(logits, x0, x_t, t, noise_schedule):
    return objective.token_bound(jax.nn.log_softmax(logits), x0, x_t, t, noise_schedule)


over_logits = (0, None, None, None, None)
logit_gradients = jax.jit(jax.vmap(jax.value_and_grad(bound_of_logits), in_axes=over_logits))
gradients_of_bound = jax.jit(jax.vmap(jax.grad(objective.token_bound), in_axes=over_logits))


def test_gradients_are_finite_at_the_edges(tables, matrices):
    num_codes = 4
    explicit = matrices(*tables, num_codes)
    noise_schedule = schedule.from_tables(*tables, num_codes)
    logits = jnp.array(
        [[1e4, -1e4, 0, 0], [-1e4, -1e4, 1e4, 1e4], [1e4, 0, 0, 0], [0, 0, 0, 0]], jnp.float32
    )
    onehot = log(np.eye(num_codes))
    for t in (1, explicit.num_steps):
        for x0 in (0, 2):
            for x_t in (0, 1, num_codes):
                if explicit.can_be(x_t, t, x0):
                    case = x0, x_t, t
                    values, slopes = logit_gradients(logits, *case, noise_schedule)
                    assert np.isfinite(values).all(), case
                    assert np.isfinite(slopes).all(), case
                    slopes = gradients_of_bound(onehot, *case, noise_schedule)
                    assert np.isfinite(slopes).all(), case


@pytest.mark.parametrize("setting", ["a", "b", "c"])
def test_golden_loss_and_gradient(golden, setting):
    g = golden("loss")
    num_steps, num_codes = int(g["T"]), int(g["K"])
    noise_schedule = schedule.released(num_steps, num_codes)
    t, x0, x_t = g["t"] + 1, g["x0"], g["x_t"]
    weight = np.where(x_t == num_codes, *g[f"{setting}_mask_weight"]).astype(np.float32)
    # At t = 1 the published loss does not weigh tokens.
    weight[t == 1] = 1
    factor = 2 - (t - 1) / num_steps if g[f"{setting}_adaptive"] else np.ones(len(t))

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(logits):
        bound, cross_entropy = objective.terms(logits, x0, x_t, t, noise_schedule)
        main, auxiliary = (weight * bound).sum(1), (weight * cross_entropy).sum(1)
        total = (main + factor * g[f"{setting}_aux_weight"] * auxiliary) / g["p_t"]
        return total.sum() / x0.size, (main, auxiliary, total)

    (value, (main, auxiliary, total)), gradient = jax.jit(loss)(g["logits"].transpose(0, 2, 1))
    # The _f64 numbers are the exact ones; the published float32 differs from them by 2e-5.
    np.testing.assert_allclose(main, g[f"{setting}_main_f64"], rtol=1e-5)
    if setting != "c":
        np.testing.assert_allclose(auxiliary, g[f"{setting}_aux_f64"], rtol=1e-5)
    np.testing.assert_allclose(total, g[f"{setting}_total_f64"], rtol=1e-5)
    np.testing.assert_allclose(value, g[f"{setting}_loss_f64"], rtol=1e-5)
    np.testing.assert_allclose(value, g[f"{setting}_loss"], rtol=1e-4)
    theirs = g[f"{setting}_grad_logits"].transpose(0, 2, 1)
    np.testing.assert_allclose(gradient, theirs, atol=1e-5)


@pytest.mark.parametrize("setting", ["a", "b", "c"])
def test_golden_time_statistics(golden, setting):
    g = golden("loss")
    before = objective.TimeStatistics(
        jnp.asarray(g["lt_history_before"]), jnp.asarray(g["lt_count_before"])
    )
    after = objective.update_time_statistics(before, g["t"] + 1, jnp.asarray(g[f"{setting}_main"]))
    np.testing.assert_allclose(after.squared_loss, g[f"{setting}_lt_history_after"], rtol=1e-6)
    np.testing.assert_array_equal(after.visits, g[f"{setting}_lt_count_after"])


def test_golden_importance_sampling(golden):
    g = golden("loss")
    history = jnp.asarray(g["lt_history_before"])
    visited = objective.TimeStatistics(history, jnp.full_like(history, 11))
    np.testing.assert_allclose(objective.time_probabilities(visited), g["importance_p"], rtol=1e-6)


def test_times_are_uniform_until_all_are_known():
    squared_loss, visits = jnp.arange(1.0, 5.0), jnp.array([99.0, 99.0, 10.0, 99.0])
    statistics = objective.TimeStatistics(squared_loss, visits)
    np.testing.assert_allclose(objective.time_probabilities(statistics), 0.25)
    known = statistics.replace(visits=visits + 1)
    root = np.sqrt([2, 2, 3, 4])
    np.testing.assert_allclose(objective.time_probabilities(known), root / root.sum(), rtol=1e-4)
    alone = objective.TimeStatistics(jnp.array([2.0]), jnp.array([20.0]))
    np.testing.assert_allclose(objective.time_probabilities(alone), 1.0)


def test_statistics_do_not_depend_on_the_order_of_a_batch():
    before = objective.TimeStatistics(jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 5.0, 6.0]))
    times, losses = np.array([3, 1, 3, 3]), np.array([2.0, 1.0, 4.0, 6.0], np.float32)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        after = objective.update_time_statistics(before, times[order], jnp.asarray(losses[order]))
        mean = (4 + 16 + 36) / 3
        np.testing.assert_allclose(
            after.squared_loss, [0.9 + 0.1, 2.0, 0.9 * 3 + 0.1 * mean], rtol=1e-6
        )
        np.testing.assert_array_equal(after.visits, [5, 5, 9])


def test_sampled_times_keep_their_marginals():
    p = jnp.array([0.05, 0.4, 0.0, 0.3, 0.25])
    batch, rounds = 6, 4000
    draw = jax.jit(jax.vmap(lambda key: objective.sample_times(key, p, batch)))
    times = np.asarray(draw(jax.random.split(jax.random.key(0), rounds)))
    assert times.min() >= 1
    share = np.stack([(times == t).mean(1) for t in range(1, 6)], 1)
    assert not share[:, 2].any()
    error = np.abs(share.mean(0) - np.asarray(p))
    # Stratified draws vary less than independent ones: a round is never off by a whole image.
    assert (error < 4 * np.sqrt(np.asarray(p) / (batch * rounds)) + 1e-9).all()
    assert (np.abs(share - np.asarray(p)) < 1 / batch + 1e-6).all()


@pytest.mark.parametrize("rows", [slice(0, None, 2), slice(3, None, 4)])
def test_every_data_set_of_a_mixture_meets_every_time(rows):
    # Two sets take turns in a batch, one to one or three to one.
    num_steps, batch, rounds = 100, 32, 3000
    p = jnp.full(num_steps, 1 / num_steps)
    draw = jax.jit(jax.vmap(lambda key: objective.sample_times(key, p, batch)))
    times = np.asarray(draw(jax.random.split(jax.random.key(0), rounds)))
    counts = np.bincount(times[:, rows].ravel(), minlength=num_steps + 1)[1:]
    # A round has one time in each of 32 strata, so counts vary less than independent ones.
    assert stats.chisquare(counts).pvalue > 1e-4
    # A round as a whole is stratified still.
    in_order = np.sort(times, axis=1)
    strata = np.arange(batch) * num_steps / batch
    assert (in_order >= np.floor(strata) + 1).all()
    assert (in_order <= np.ceil(strata + num_steps / batch)).all()


NUM_CODES, NUM_TOKENS, NUM_STEPS = 3, 2, 5
LOGITS = 1.5 * np.random.default_rng(0).normal(
    size=(NUM_TOKENS, NUM_STEPS + 1, NUM_TOKENS, NUM_CODES + 1, NUM_CODES)
).astype(np.float32)


def predict(tokens, time):
    """log p0 [B, N, K] that depends on every token, the position and the time."""
    table, position = jnp.asarray(LOGITS), jnp.arange(tokens.shape[1])
    return jax.nn.log_softmax(
        sum(table[n, time[:, None], position, tokens[:, [n]]] for n in range(tokens.shape[1]))
    )


# Compiled once for all schedules.
@functools.partial(jax.jit, static_argnums=3)
def likelihoods(keys, x0, noise_schedule, num_draws):
    return jax.vmap(lambda key: objective.likelihood(key, predict, x0, noise_schedule, num_draws))(
        keys
    )


@functools.partial(jax.jit, static_argnames=("auxiliary_weight",))
def losses(keys, x0, noise_schedule, statistics, auxiliary_weight, mask_weight=(1.0, 1.0)):
    def loss(key):
        return objective.variational_bound(
            key, predict, x0, noise_schedule, statistics,
            auxiliary_weight=auxiliary_weight, mask_weight=mask_weight,
        )  # fmt: skip

    return jax.vmap(loss)(keys)


def require_near(draws, exact):
    draws = np.asarray(draws, np.float64)
    assert abs(draws.mean() - exact) < 4 * draws.std() / np.sqrt(len(draws)) + 1e-6


def test_likelihood_is_the_enumerated_bound(tables, matrices):
    explicit = matrices(*tables, NUM_CODES)
    x0 = np.array([[0, 2]])
    exact = 0.0
    states = np.array(list(np.ndindex(*[NUM_CODES + 1] * NUM_TOKENS)))
    for t in range(1, NUM_STEPS + 1):
        p0 = np.exp(np.asarray(predict(states, np.full(len(states), t)), np.float64))
        for x_t, p in zip(states, p0, strict=True):
            q = np.prod(explicit.between(0, t)[x_t, x0[0]])
            if q > 1e-15:
                exact += q * sum(
                    divergence(
                        explicit.posterior(np.eye(NUM_CODES)[x0[0, n]], x_t[n], t - 1, t),
                        explicit.posterior(p[n] / p[n].sum(), x_t[n], t - 1, t),
                    )
                    for n in range(NUM_TOKENS)
                )
    exact /= NUM_TOKENS * np.log(2)
    keys = jax.random.split(jax.random.key(0), 4000)
    noise_schedule = schedule.from_tables(*tables, NUM_CODES)
    require_near(likelihoods(keys, x0, noise_schedule, NUM_STEPS)[:, 0], exact)
    require_near(likelihoods(keys, x0, noise_schedule, 2)[:, 0], exact)


def test_likelihood_bounds_the_law_of_the_chain(tables, matrices):
    explicit = matrices(*tables, NUM_CODES)
    end = explicit.between(0, NUM_STEPS)[:, :NUM_CODES]
    prior = np.append(np.full(NUM_CODES, (1 - end[NUM_CODES, 0]) / NUM_CODES), end[NUM_CODES, 0])
    law = prior
    tokens = np.arange(NUM_CODES + 1)[:, None]
    for t in range(NUM_STEPS, 0, -1):
        p0 = np.exp(np.asarray(predict(tokens, np.full(len(tokens), t))[:, 0], np.float64))
        law = sum(
            law[x] * explicit.posterior(p0[x] / p0[x].sum(), x, t - 1, t)
            for x in np.flatnonzero(law > 1e-12)
        )
    np.testing.assert_allclose(law.sum(), 1, atol=1e-6)
    keys = jax.random.split(jax.random.key(1), 4000)
    noise_schedule = schedule.from_tables(*tables, NUM_CODES)
    bits = np.asarray(likelihoods(keys, tokens[:-1], noise_schedule, NUM_STEPS), np.float64)
    bits += [divergence(end[:, x0], prior) / np.log(2) for x0 in range(NUM_CODES)]
    slack = 4 * np.std(bits, axis=0) / np.sqrt(len(keys)) + 1e-5
    assert (np.mean(bits, axis=0) + slack > -np.log2(law[:NUM_CODES])).all()


def test_variational_bound_is_an_estimate_of_the_likelihood(tables):
    batch = 8
    noise_schedule = schedule.from_tables(*tables, NUM_CODES)
    x0 = np.array([[0, 2]] * batch)
    statistics = objective.TimeStatistics(
        jnp.array([1.0, 0.1, 2.0, 0.5, 0.3]), jnp.full(NUM_STEPS, 20.0)
    )
    keys = jax.random.split(jax.random.key(0), 3000)
    loss, aux = losses(keys, x0, noise_schedule, statistics, 0.1)
    bits = likelihoods(keys, x0, noise_schedule, NUM_STEPS).mean(axis=1)
    require_near(aux["bound"] - bits * np.log(2), 0.0)
    assert (loss > aux["bound"]).all()
    np.testing.assert_allclose(aux["statistics"].visits.sum(1), 100 + batch)


def test_mask_weights_scale_masked_and_visible_tokens():
    x0 = np.tile([[0, 2], [1, 1]], (8, 1))
    statistics = objective.init_time_statistics(NUM_STEPS)
    noise_schedule = schedule.paper(NUM_STEPS, NUM_CODES)
    keys = jax.random.split(jax.random.key(0), 1)
    weights = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
    none, masked, visible, both = (
        losses(keys, x0, noise_schedule, statistics, 0.0, w)[1]["bound"][0] for w in weights
    )
    # Linear in both weights; what neither weighs are the images at time 1.
    np.testing.assert_allclose(masked + visible - none, both, rtol=1e-5)
    assert 0 < none < visible < both
    assert none < masked


def test_noise_of_a_batch_has_the_marginal_law():
    num_codes, shape = 4, (64, 200)
    noise_schedule = schedule.paper(5, num_codes)
    x0 = jnp.ones(shape, jnp.int32)
    t = jnp.tile(jnp.arange(4) + 1, 16)
    x_t = np.asarray(objective.noise(jax.random.key(0), x0, t, noise_schedule))
    for time in range(1, 5):
        counts = np.bincount(x_t[np.asarray(t) == time].ravel(), minlength=num_codes + 1)
        s = noise_schedule
        p = np.array([s.replace[time]] * num_codes + [s.mask[time]], np.float64)
        p[1] += s.keep[time]
        assert stats.chisquare(counts, counts.sum() * p / p.sum()).pvalue > 1e-4


@pytest.mark.parametrize(
    "num_tokens",
    [pytest.param(1, marks=pytest.mark.slow), 15, pytest.param(16, marks=pytest.mark.slow), 50],
)
def test_chunks_leave_values_and_gradients(num_tokens, monkeypatch):
    # Terms are computed a chunk of tokens at a time; the last chunk may overlap the one before.
    monkeypatch.setattr(chunks, "MIN_SIZE", {"cpu": 1, "others": 1})
    num_codes, batch = 5, 3
    noise_schedule = schedule.paper(NUM_STEPS, num_codes)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(batch, num_tokens, num_codes)).astype(np.float32)
    x0 = rng.integers(0, num_codes, (batch, num_tokens))
    x_t = rng.integers(0, num_codes + 1, (batch, num_tokens))
    t = np.array([1, 3, 5])
    weights = rng.normal(size=(2, batch, num_tokens)).astype(np.float32)

    def chunked(logits):
        values = objective.terms(logits, x0, x_t, t, noise_schedule)
        return sum((w * v).sum() for w, v in zip(weights, values, strict=True)), values

    def plain(logits):
        log_x0 = jax.nn.log_softmax(logits)
        bound = jax.vmap(objective.token_bound, in_axes=(0, 0, 0, None, None))
        bound = jax.vmap(bound, in_axes=(0, 0, 0, 0, None))(log_x0, x0, x_t, t, noise_schedule)
        values = bound, -jnp.take_along_axis(log_x0, x0[..., None], -1)[..., 0]
        return sum((w * v).sum() for w, v in zip(weights, values, strict=True)), values

    (_, ours), gradient = jax.jit(jax.value_and_grad(chunked, has_aux=True))(logits)
    (_, exact), slope = jax.jit(jax.value_and_grad(plain, has_aux=True))(logits)
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(
    "shape, widths",
    [
        ((1, 64, 128), (64, 64)),
        ((1, 64, 2887), (64, 64)),
        ((16, 64, 2887), (6, 64)),
        ((1, 1024, 2887), (91, 1024)),
        ((4, 1024, 2887), (64, 364)),
        ((32, 1024, 2887), (64, 64)),
    ],
)
def test_small_arrays_have_few_chunks(shape, widths, platform):
    batch, num_tokens, num_codes = shape

    def of_array(x):
        return chunks.over_tokens(lambda part: part.max(-1), x, axis=1)

    x = jax.ShapeDtypeStruct(shape, np.float32)
    text = jax.jit(of_array).trace(x).lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(rf"tensor<{batch}x(\d+)x{num_codes}xf32>", text)
    assert set(map(int, found)) == {num_tokens, widths[platform == "tpu"]}
    assert ("stablehlo.while" in text) == (widths[platform == "tpu"] < num_tokens)


@pytest.mark.slow
def test_logits_and_their_log_softmax_give_one_loss():
    x0 = np.tile([[0, 2], [1, 1]], (4, 1))
    noise_schedule = schedule.paper(NUM_STEPS, NUM_CODES)

    @functools.partial(jax.jit, static_argnums=0)
    def loss(network):
        return objective.variational_bound(
            jax.random.key(0), network, x0, noise_schedule,
            objective.init_time_statistics(NUM_STEPS), auxiliary_weight=0.1,
        )  # fmt: skip

    value, aux = loss(predict)
    shifted, shifted_aux = loss(lambda tokens, time: predict(tokens, time) + 7.0)
    np.testing.assert_allclose(value, shifted, rtol=1e-5)
    np.testing.assert_allclose(aux["accuracy"], shifted_aux["accuracy"])


def test_the_loss_stores_little_beside_the_gradient():
    # Compiled, not run: 4 images of 1024 tokens of 2887 codes.
    num_codes, shape = 2887, (4, 1024)
    noise_schedule = schedule.released(100, num_codes)

    def loss(logits, key, x0):
        return objective.variational_bound(
            key, lambda tokens, time: logits, x0, noise_schedule,
            objective.init_time_statistics(100), auxiliary_weight=5e-4,
        )[0]  # fmt: skip

    arguments = (
        jax.ShapeDtypeStruct((*shape, num_codes), jnp.float32),
        jax.eval_shape(lambda: jax.random.key(0)),
        jax.ShapeDtypeStruct(shape, jnp.int32),
    )
    memory = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile().memory_analysis()
    stored = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert stored < 1.5 * 4 * shape[0] * shape[1] * num_codes
