import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vqd_jax.diffusion import rules, sampler, schedule, transition

jax.config.update("jax_numpy_rank_promotion", "raise")

NUM_CODES, NUM_TOKENS, NUM_STEPS = 3, 2, 5
LOGITS = 1.5 * np.random.default_rng(0).normal(
    size=(NUM_TOKENS, NUM_STEPS + 1, NUM_TOKENS, NUM_CODES + 1, NUM_CODES)
).astype(np.float32)


def predict(tokens, time):
    """log p0 [B, N, K] that depends on every token, the position and the time."""
    table, position = jnp.asarray(LOGITS), jnp.arange(NUM_TOKENS)
    return jax.nn.log_softmax(
        sum(table[n, time[:, None], position, tokens[:, [n]]] for n in range(NUM_TOKENS))
    )


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def run(image_keys, settings, noise_schedule=None, network=predict, num_tokens=NUM_TOKENS):
    noise_schedule = noise_schedule or schedule.paper(NUM_STEPS, NUM_CODES)
    shape = (len(image_keys), num_tokens)
    return sampler.sample(image_keys, network, shape, noise_schedule, settings)


many = jax.jit(run, static_argnames=("network", "num_tokens"))


def law_of_the_chain(explicit, times, start, tempered=lambda p: p):
    """Probability of every clean image [K, K], by enumeration of the reverse chain."""
    states = np.array(list(np.ndindex(*[NUM_CODES + 1] * NUM_TOKENS)))
    masked = 1.0 if start == "masked" else explicit.between(0, NUM_STEPS)[NUM_CODES, 0]
    first = np.append(np.full(NUM_CODES, (1 - masked) / NUM_CODES), masked)
    law = np.outer(first, first)
    for t, s in zip(times[:-1], times[1:], strict=True):
        p0 = np.exp(np.asarray(predict(states, np.full(len(states), t)), np.float64))
        after = np.zeros_like(law)
        for x, p in zip(states, p0, strict=True):
            if law[tuple(x)] > 1e-14:
                first, second = (
                    explicit.posterior(tempered(p[n] / p[n].sum()), x[n], s, t)
                    for n in range(NUM_TOKENS)
                )
                after += law[tuple(x)] * np.outer(first, second)
        law = after
    return law[:NUM_CODES, :NUM_CODES]


def require_law(codes, law):
    np.testing.assert_allclose(law.sum(), 1, atol=1e-6)
    codes = np.asarray(codes)
    counts = np.bincount(NUM_CODES * codes[:, 0] + codes[:, 1], minlength=NUM_CODES**2)
    assert counts.shape == (NUM_CODES**2,)
    assert stats.chisquare(counts, len(codes) * law.ravel() / law.sum()).pvalue > 1e-4


@pytest.mark.parametrize(("num_steps", "times"), [(0, (5, 4, 3, 2, 1, 0)), (2, (5, 3, 0))])
def test_samples_have_the_law_of_the_chain(beginning, matrices, num_steps, times):
    tables, start = beginning
    noise_schedule = schedule.from_tables(*tables, NUM_CODES)
    np.testing.assert_array_equal(sampler.step_times(num_steps, noise_schedule), times)
    settings = sampler.Settings(num_steps=num_steps, start=start)
    codes = many(keys(20_000), settings, noise_schedule).codes
    require_law(codes, law_of_the_chain(matrices(*tables, NUM_CODES), times, start))


def test_temperature_sharpens_the_law(matrices, tables):
    def tempered(p):
        return p**2 / (p**2).sum()

    law = law_of_the_chain(matrices(*tables, NUM_CODES), (5, 3, 0), "schedule", tempered)
    settings = sampler.Settings(num_steps=2, temperature=0.5)
    require_law(many(keys(20_000), settings, schedule.from_tables(*tables, NUM_CODES)).codes, law)


def test_an_image_depends_on_its_own_key_only():
    image_keys = keys(3)
    settings = sampler.Settings(num_steps=4, trajectory=True)
    together = many(image_keys, settings)
    order = np.array([2, 0, 1])
    permuted = many(image_keys[order], settings)
    np.testing.assert_array_equal(permuted.codes, together.codes[order])
    np.testing.assert_array_equal(permuted.trajectory, together.trajectory[:, order])
    for i in range(3):
        alone = many(image_keys[i : i + 1], settings)
        np.testing.assert_array_equal(alone.codes, together.codes[i : i + 1])
    others = many(keys(3, seed=1), settings)
    assert (np.asarray(others.trajectory) != np.asarray(together.trajectory)).any()


@pytest.mark.parametrize("start", ["schedule", "masked"])
def test_trajectory_ends_with_the_codes_and_has_the_masks_of_every_time(start):
    settings = sampler.Settings(trajectory=True, start=start)
    result = many(keys(2000), settings)
    assert result.trajectory.shape == (NUM_STEPS, 2000, NUM_TOKENS)
    assert result.codes.dtype == result.trajectory.dtype == jnp.int32
    np.testing.assert_array_equal(result.trajectory[-1], result.codes)
    masked = (np.asarray(result.trajectory) == NUM_CODES).mean((1, 2))
    mask = schedule.paper(NUM_STEPS, NUM_CODES).mask
    expected = mask / (mask[-1] if start == "masked" else 1.0)
    np.testing.assert_allclose(masked, expected[-2::-1], atol=0.03)
    assert many(keys(2), sampler.Settings()).trajectory is None


def first_tokens(count=500, num_tokens=64, num_codes=5, **settings):
    """Times [B] and tokens [B, N] that the network sees first, under the paper's schedule."""
    seen = []

    def network(tokens, time):
        jax.debug.callback(lambda *x: seen.extend(map(np.asarray, x)), time, tokens)
        return jnp.zeros((*tokens.shape, num_codes))

    settings = sampler.Settings(num_steps=1, **settings)
    many(keys(count), settings, schedule.paper(8, num_codes), network, num_tokens)
    jax.effects_barrier()
    return seen


@pytest.mark.parametrize("rule", [rules.Ancestral(), rules.Remask()])
def test_a_chain_begins_from_the_law_of_its_schedule(rule):
    noise_schedule = schedule.paper(8, 5)
    time, tokens = first_tokens(rule=rule)
    assert time[0] == 8
    shares = np.bincount(tokens.ravel(), minlength=6) / tokens.size
    np.testing.assert_allclose(shares[5], noise_schedule.mask[8], atol=0.01)
    np.testing.assert_allclose(shares[:5], (1 - noise_schedule.mask[8]) / 5, atol=0.005)


def test_rules_that_never_revisit_a_token_begin_all_masked():
    _, tokens = first_tokens(rule=rules.HighQuality())
    assert (tokens == 5).all()
    others = rules.Purity(), rules.Confidence(), rules.Halton((8, 8)), rules.PublishedFast(1)
    assert {rule.start for rule in others} == {"masked"}


def test_beside_known_codes_a_chain_begins_with_the_noise_of_its_time():
    # Of 64 codes 16 are known, and the network must see what it met in training at that time.
    noise_schedule, known = schedule.paper(8, 5), np.full((500, 64), 5, np.int32)
    known[:, ::4] = 2
    time, tokens = first_tokens(known=known)
    assert (tokens[:, ::4] == 2).all()
    t = time[0]
    # The first time with 3/4 of the masks of time T; a step has an eighth of them.
    masked = (tokens == 5).mean()
    assert noise_schedule.mask[t - 1] - 0.01 < masked < noise_schedule.mask[t] + 0.01
    noise = (tokens < 5).mean() - 16 / 64
    replaced = 5 * noise_schedule.replace
    assert replaced[t - 1] - 0.005 < noise < replaced[t] + 0.005


TRUTH = np.array([[0, 2], [1, 1], [2, 0]])


def knows(tokens, time):
    del tokens, time
    return jnp.where(jax.nn.one_hot(TRUTH, NUM_CODES) > 0, 0.0, transition.LOG_ZERO)


def test_a_network_that_knows_the_truth_gives_the_truth(beginning):
    tables, start = beginning
    noise_schedule = schedule.from_tables(*tables, NUM_CODES)
    for num_steps in (1, NUM_STEPS):
        settings = sampler.Settings(num_steps=num_steps, start=start)
        np.testing.assert_array_equal(many(keys(3), settings, noise_schedule, knows).codes, TRUTH)


@pytest.mark.parametrize("num_steps", [-1, 6, 100])
def test_impossible_numbers_of_steps(num_steps):
    with pytest.raises(ValueError, match=rf"num_steps must lie in 1\.\.5.*got {num_steps}"):
        run(keys(1), sampler.Settings(num_steps=num_steps))


def test_step_times_are_even_and_end_at_0():
    noise_schedule = schedule.released(100, 10)
    for num_steps in range(1, 101):
        times = sampler.step_times(num_steps, noise_schedule)
        assert len(times) == num_steps + 1
        assert (times[0], times[-1]) == (100, 0)
        lengths = -np.diff(times)
        assert lengths.min() >= 1
        assert lengths.max() - lengths.min() <= 1


def test_keys_must_match_the_shape():
    with pytest.raises(AssertionError):
        sampler.sample(keys(2), predict, (3, NUM_TOKENS), schedule.paper(5, 3), sampler.Settings())


def rows(x):
    """Golden arrays have classes second and a last class for the mask."""
    return jnp.asarray(np.moveaxis(x, -2, -1)[..., :-1])


@pytest.mark.parametrize("scale", ["000", "010", "015", "030", "080"])
def test_golden_guidance(golden, scale):
    g = golden("sampling")
    theirs = rows(g[f"cfg_static_log_p0_s{scale}"])
    ours = sampler.guide(
        rows(g["cfg_static_log_pc"]), rows(g["cfg_static_log_pu"]), int(scale) / 10
    )
    # The published code stops at -70.
    np.testing.assert_allclose(jnp.maximum(ours, -70), theirs, atol=5e-5)
    np.testing.assert_allclose(jnp.exp(ours).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("rate", ["010", "030", "050", "086", "095"])
def test_golden_truncation(golden, rate):
    g = golden("sampling")
    before, theirs = rows(g["trunc_in"]), rows(g[f"trunc_out_r{rate}"])
    ours = sampler.truncate(before, int(rate) / 100)
    kept = np.asarray(theirs) > -69.9
    np.testing.assert_array_equal(np.asarray(ours) > -1e20, kept)
    # The published code leaves the rest unnormalised.
    p = np.where(kept, np.exp(theirs), 0)
    np.testing.assert_allclose(np.exp(ours), p / p.sum(-1, keepdims=True), atol=1e-6)


def test_truncation_of_extreme_distributions():
    flat = jnp.full((5,), -jnp.log(5.0))
    np.testing.assert_allclose(jnp.exp(sampler.truncate(flat, 0.5)), 0.2, rtol=1e-6)
    onehot = jnp.array([0.0, transition.LOG_ZERO, transition.LOG_ZERO])
    np.testing.assert_allclose(jnp.exp(sampler.truncate(onehot, 0.9)), [1, 0, 0])
    p = jnp.array([0.5, 0.3, 0.15, 0.05])
    for rate, count in [(0.01, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4)]:
        kept = sampler.truncate(jnp.log(p), rate) > -1e20
        np.testing.assert_array_equal(kept, np.arange(4) < count)
    wide = jax.nn.log_softmax(jnp.linspace(0, -300, 1000))
    kept = np.asarray(sampler.truncate(wide, 0.86) > -1e20)
    exact = np.cumsum(np.exp(np.asarray(wide, np.float64)))
    assert kept.sum() == np.searchsorted(exact, 0.86) + 1


def replay(g, name, truncation=None, scale=None):
    """Steps of a golden chain: its tokens, and p0 and posterior recomputed from them."""
    num_codes = int(g["K"])
    noise_schedule = schedule.released(int(g["T"]), num_codes)
    tokens = np.full(g[f"{name}_tokens"].shape[1:], num_codes)
    posterior = jax.vmap(transition.posterior, in_axes=(0, 0, None, None, None))
    posterior = jax.jit(jax.vmap(posterior, in_axes=(0, 0, None, None, None)))
    table, emb, cond, null = g["table"], g["emb"], g["cond"], g["null"]
    times = g.get(f"{name}_t", g[f"{name}_posterior_t"])
    for i, (t, posterior_t) in enumerate(zip(times, g[f"{name}_posterior_t"], strict=True)):
        base = (table[t].T[None] + emb[tokens]).astype(np.float32)
        log_x0 = jax.nn.log_softmax(base + cond.transpose(0, 2, 1))
        if scale is not None:
            log_x0 = sampler.guide(log_x0, jax.nn.log_softmax(base + null.T[None]), scale)
        if truncation is not None:
            log_x0 = sampler.truncate(log_x0, truncation)
        log_p = posterior(log_x0, tokens, posterior_t, posterior_t + 1, noise_schedule)
        u = g[f"{name}_uniform"][i].transpose(0, 2, 1).astype(np.float64)
        tokens = np.argmax(np.asarray(log_p) - np.log(-np.log(u + 1e-30) + 1e-30), -1)
        yield log_x0, log_p, tokens


@pytest.mark.parametrize("name", ["plain", "trunc", "cfg", "cfg_trunc"])
def test_golden_chains(golden, name):
    g = golden("sampling")
    steps = list(
        replay(
            g,
            name,
            truncation=g.get(f"{name}_rate"),
            scale=g.get(f"{name}_scale"),
        )
    )
    for i, (log_x0, log_p, tokens) in enumerate(steps):
        np.testing.assert_array_equal(tokens, g[f"{name}_tokens"][i], err_msg=f"step {i}")
        if name == "plain":
            theirs = np.exp(g["plain_posterior"][i]).transpose(0, 2, 1)
            np.testing.assert_allclose(np.exp(log_p), theirs, atol=5e-6)
        if name == "cfg_trunc":
            theirs = np.exp(rows(g["cfg_trunc_log_p0"][i]))
            theirs = theirs / theirs.sum(-1, keepdims=True)
            np.testing.assert_allclose(np.exp(log_x0), theirs, atol=5e-6)


@pytest.mark.slow
def test_guidance_asks_for_pairs_of_rows_in_one_call():
    asked = []

    def network(tokens, time):
        asked.append((tokens.shape, time.shape))
        cond = predict(tokens, time)
        return jnp.where(jnp.arange(8)[:, None, None] % 2, -jnp.log(3.0), cond)

    settings = sampler.Settings(num_steps=3, guidance=1.0)
    guided = many(keys(4), settings, network=network)
    assert set(asked) == {((8, NUM_TOKENS), (8,))}
    # Scale 1 gives the conditional distribution back.
    np.testing.assert_array_equal(guided.codes, many(keys(4), sampler.Settings(num_steps=3)).codes)


def test_numbers_in_the_settings_do_not_recompile():
    traced = []

    @jax.jit
    def count(image_keys, settings):
        traced.append(None)
        return run(
            image_keys,
            settings,
            network=lambda x, t: jnp.zeros((*x.shape, NUM_CODES)) - jnp.log(3.0),
        ).codes

    for seed, scale in enumerate([1.0, 2.0, 3.0]):
        count(keys(2, seed), sampler.Settings(guidance=scale, truncation=scale / 4))
    assert len(traced) == 1


def test_the_likeliest_codes_are_found_without_sorting_all():
    """XLA falls back to a sort of all codes where its pattern of the first few is not met."""
    log_x0 = jnp.log(jax.random.dirichlet(jax.random.key(0), jnp.ones(64), (2, 3)))
    tokens = jnp.array([[0, 64, 2], [64, 4, 64]])
    program = jax.jit(sampler._answer, static_argnums=2).lower(log_x0, tokens, 5).compile()
    assert " sort(" not in program.as_text()
    answer = program(log_x0, tokens)
    order = np.argsort(-np.asarray(log_x0), axis=-1)[..., :5]
    np.testing.assert_array_equal(answer.candidates, order)
    best = np.take_along_axis(np.asarray(log_x0), order, axis=-1)
    np.testing.assert_allclose(answer.probabilities, np.exp(best), rtol=1e-6)
    there = np.where(tokens < 64, tokens, order[..., 0])[..., None]
    there = np.take_along_axis(np.asarray(log_x0), there, axis=-1)[..., 0]
    np.testing.assert_allclose(answer.confidence, np.exp(there), rtol=1e-6)
