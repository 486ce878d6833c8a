"""Rules that look at the network's answer to choose what to draw: proofs at small K and N."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vqd_jax.diffusion import rules, sampler, schedule, transition

jax.config.update("jax_numpy_rank_promotion", "raise")

K = 3
# Masks alone, and as many times as tokens: every step reveals one of four.
FOUR = schedule.linear(4, K, keep=(0.75, 0.0), mask=(0.25, 1.0))


def chain(rule, count, num_tokens, noise_schedule, network, **settings):
    settings = sampler.Settings(rule=rule, trajectory=True, **settings)
    shape = (count, num_tokens)
    run = jax.jit(lambda keys: sampler.sample(keys, network, shape, noise_schedule, settings))
    return jax.tree.map(np.asarray, run(jax.random.split(jax.random.key(0), count)))


def one_step(rule, count, log_x0, tokens, step, noise_schedule):
    """Tokens [count, N] after one step of equal images."""
    draw = jax.jit(jax.vmap(lambda key: rule(key, log_x0, tokens, step, noise_schedule)))
    return np.asarray(draw(jax.random.split(jax.random.key(1), count)))


def joint_of(seed, num_tokens=3, num_codes=K):
    """A random law of all tokens, float64 [K] * N."""
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(num_codes**num_tokens, 0.3)).reshape([num_codes] * num_tokens)


def conditionals(joint):
    """The network that knows the law of all tokens: log p(x_0 of a token | the visible ones)."""
    num_tokens, num_codes = joint.ndim, joint.shape[0]
    states = list(itertools.product(range(num_codes + 1), repeat=num_tokens))
    table = np.zeros((len(states), num_tokens, num_codes))
    for number, state in enumerate(states):
        seen = np.array(joint)
        for axis, token in enumerate(state):
            if token < num_codes:
                there = np.arange(num_codes).reshape(
                    [-1 if a == axis else 1 for a in range(num_tokens)]
                )
                seen = np.where(there == token, seen, 0)
        for axis in range(num_tokens):
            law = seen.sum(axis=tuple(a for a in range(num_tokens) if a != axis))
            table[number, axis] = law / law.sum()
    logs = jnp.asarray(np.log(np.maximum(table, 1e-30)), jnp.float32)
    place = (num_codes + 1) ** np.arange(num_tokens)[::-1]
    return lambda tokens, time: logs[(tokens * place[None]).sum(-1)]


def counts(tokens, num_values):
    """How often each row occurs among all that are possible."""
    place = num_values ** np.arange(tokens.shape[-1])[::-1]
    return np.bincount((tokens * place).sum(-1), minlength=num_values ** tokens.shape[-1])


def test_leaving_one_out_is_the_law_given_the_others(tables):
    noise_schedule = schedule.from_tables(*tables, K)
    joint = joint_of(0, num_tokens=2)
    keep, replace, mask = (
        np.asarray(x, np.float64)
        for x in (noise_schedule.keep, noise_schedule.replace, noise_schedule.mask)
    )
    for t in (1, 3, 5):
        if replace[t] == 0:
            continue
        q = np.vstack([keep[t] * np.eye(K) + replace[t], np.full(K, mask[t])])
        law = np.einsum("kl,xk,yl->xykl", joint, q, q)
        # p(x_t): one Gibbs step of the first token, by the law that leaves it out, keeps it.
        of_noisy, kept = law.sum((2, 3)), np.zeros((K + 1, K + 1))
        for x, y in itertools.product(range(K + 1), repeat=2):
            if of_noisy[x, y] < 1e-12:
                continue
            p0 = np.stack([law[x, y].sum(1), law[x, y].sum(0)]) / of_noisy[x, y]
            tokens = np.array([x, y], np.int32)
            log_x0 = jnp.asarray(np.log(p0), jnp.float32)
            log_others = rules.leave_one_out(log_x0, tokens, t, noise_schedule)
            exact = law[:, y].sum((0, 2)) / law[:, y].sum()
            np.testing.assert_allclose(np.exp(log_others[0]), exact, atol=2e-5)
            gibbs = np.exp(transition.marginal(log_others[0], t, noise_schedule))
            kept[:, y] += of_noisy[x, y] * gibbs
        np.testing.assert_allclose(kept, of_noisy, atol=2e-5)


def test_leave_one_out_draws_from_that_law():
    noise_schedule = schedule.linear(6, K, keep=(0.85, 0.1), mask=(0.05, 0.6))
    log_x0 = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.2, 0.5, 0.3]]))
    tokens, count = jnp.array([0, K, 2]), 8_000
    step = rules.Step(*map(jnp.int32, (2, 4, 6, 3)), masked_share=noise_schedule.mask[6])
    made = one_step(rules.LeaveOneOut(1.0), count, log_x0, tokens, step, noise_schedule)
    others = rules.leave_one_out(log_x0, tokens, 4, noise_schedule)
    exact = jax.vmap(transition.marginal, (0, None, None))(others, 2, noise_schedule)
    exact = np.exp(np.asarray(exact, np.float64))
    for place in range(3):
        seen = np.bincount(made[:, place], minlength=K + 1)
        assert stats.chisquare(seen, exact[place] / exact[place].sum() * count).pvalue > 1e-4
    # The masked token's law is p0's; the visible one's is not.
    np.testing.assert_allclose(others[1], log_x0[1], atol=1e-5)
    assert np.abs(np.exp(others[0]) - np.exp(log_x0[0])).max() > 0.2


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_leave_one_out_keeps_the_marginals_of_a_chain(share):
    noise_schedule = schedule.linear(6, K, keep=(0.85, 1e-6), mask=(0.05, 0.8))
    truth = jnp.where(jnp.arange(K) == 2, 0.0, transition.LOG_ZERO)
    exact = jax.vmap(transition.marginal, (None, 0, None))(
        truth, np.arange(5, -1, -1), noise_schedule
    )
    steps = chain(
        rules.LeaveOneOut(share), 400, 64, noise_schedule,
        lambda tokens, time: jnp.broadcast_to(truth, (*tokens.shape, K)),
    ).trajectory  # fmt: skip
    seen = np.stack([(steps == x).mean((1, 2)) for x in range(K + 1)], 1)
    np.testing.assert_allclose(seen, np.exp(exact), atol=0.015)
    assert ((steps[:-1] < K) & (steps[1:] == K)).any() == (share > 0)


def test_leave_one_out_leaves_what_is_certain():
    log_x0 = jnp.log(jnp.full((4, K), 1 / K))
    step = rules.Step(*map(jnp.int32, (1, 2, 4, 2)))
    tokens = jnp.array([0, K, 2, K])
    made = one_step(rules.LeaveOneOut(1.0), 200, log_x0, tokens, step, FOUR)
    np.testing.assert_array_equal(made[:, [0, 2]], np.tile([0, 2], (200, 1)))
    assert (made[:, [1, 3]] < K).any()


def test_moment_chooses_by_moments_and_draws_the_powers():
    p0 = np.array([[0.8, 0.1, 0.1], [0.4, 0.35, 0.25], [0.5, 0.5, 1e-30]])
    noise_schedule = schedule.linear(3, K, keep=(2 / 3, 0.0), mask=(1 / 3, 1.0))
    step = rules.Step(*map(jnp.int32, (1, 3, 3, 3)))
    rule = rules.Moment(temperature=2.0)
    power = 1 + 1 / (2.0 / 3)
    np.testing.assert_allclose(rule.power(step), power, rtol=1e-6)
    weights, sharp = (p0**power).sum(1), p0**power / (p0**power).sum(1, keepdims=True)
    exact = np.zeros([K + 1] * 3)
    # Two of three positions, drawn one after the other, and then their codes.
    for first, second in itertools.permutations(range(3), 2):
        order = weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first])
        for a, b in itertools.product(range(K), repeat=2):
            state = [K, K, K]
            state[first], state[second] = a, b
            exact[tuple(state)] += order * sharp[first, a] * sharp[second, b]
    np.testing.assert_allclose(exact.sum(), 1)
    count, log_x0 = 12_000, jnp.asarray(np.log(p0), jnp.float32)
    made = one_step(rule, count, log_x0, jnp.full(3, K), step, noise_schedule)
    seen, exact = counts(made, K + 1), exact.ravel()
    possible = exact > 1e-12
    assert seen[~possible].sum() == 0
    assert stats.chisquare(seen[possible], exact[possible] * count).pvalue > 1e-4
    # The last step has no choice, and draws from p0.
    last = rules.Step(*map(jnp.int32, (0, 1, 3, 3)))
    made = one_step(rule, count, log_x0, jnp.array([1, K, K]), last, noise_schedule)
    seen = np.bincount(made[:, 1], minlength=K)
    assert stats.chisquare(seen, p0[1] * count).pvalue > 1e-4


def test_moment_with_uniform_choice_has_the_marginals_of_the_ancestral_chain():
    p0 = np.random.default_rng(0).dirichlet(np.ones(K), 4)
    log_x0, count = jnp.asarray(np.log(p0), jnp.float32), 12_000
    network = lambda tokens, time: jnp.broadcast_to(log_x0, (*tokens.shape, K))  # noqa: E731
    exact = jax.vmap(jax.vmap(transition.marginal, (0, None, None)), (None, 0, None))(
        log_x0, np.arange(3, -1, -1), FOUR
    )
    for rule in (rules.Moment(temperature=np.inf), rules.Ancestral()):
        steps = chain(rule, count, 4, FOUR, network).trajectory
        seen = np.stack([(steps == x).mean(1) for x in range(K + 1)], -1)
        np.testing.assert_allclose(seen, np.exp(exact), atol=0.02)
    # It reveals one in every step, and the ancestral chain one in the mean.
    steps = chain(
        rules.Moment(temperature=np.inf), 50, 4, FOUR, network, calls_per_step=1
    ).trajectory
    np.testing.assert_array_equal((steps == K).sum(-1), np.tile([[3], [2], [1], [0]], (1, 50)))


def test_moment_becomes_confidence_among_many_tokens():
    temperature, distances = 1.5, []
    power = 1 + 1 / temperature
    for num_tokens in (2, 4, 8):
        first = np.linspace(0.3, 0.9, num_tokens)
        p0 = np.stack([first, 1 - first], -1)
        # MaskGIT draws all codes and takes one position in proportion to p0[code]^(1/temperature).
        confident = np.zeros((num_tokens, 2))
        for codes in itertools.product(range(2), repeat=num_tokens):
            p = p0[np.arange(num_tokens), codes]
            share = p.prod() * p ** (1 / temperature) / (p ** (1 / temperature)).sum()
            np.add.at(confident, (np.arange(num_tokens), codes), share)
        distances.append(0.5 * np.abs(confident - p0**power / (p0**power).sum()).sum())
    assert distances[0] > 1.7 * distances[1] > 1.7**2 * distances[2]
    assert distances[2] < 0.01


def test_no_bound_draws_everything_in_one_call():
    called = []

    def network(tokens, time):
        jax.debug.callback(lambda t: called.append(np.asarray(t)), time)
        return jnp.zeros((*tokens.shape, K))

    made = chain(rules.EntropyBound(np.inf), 5, 8, schedule.released(20, K), network)
    jax.effects_barrier()
    assert len(called) == 1
    assert (made.trajectory < K).all()
    np.testing.assert_array_equal(made.trajectory, np.tile(made.trajectory[:1], (20, 1, 1)))
    np.testing.assert_array_equal(made.predictions[1:], made.trajectory[1:])


def test_bound_zero_draws_one_at_a_time_the_surest_first():
    called = []
    peak = jnp.array([0.9, 0.6, 0.99, 0.8])
    log_x0 = jnp.log(jnp.stack([peak, (1 - peak) / 2, (1 - peak) / 2], -1))

    def network(tokens, time):
        jax.debug.callback(lambda t: called.append(np.asarray(t)), time)
        return jnp.broadcast_to(log_x0, (*tokens.shape, K))

    steps = chain(rules.EntropyBound(0.0), 3, 4, FOUR, network).trajectory
    jax.effects_barrier()
    np.testing.assert_array_equal((steps == K).sum(-1), np.tile([[3], [2], [1], [0]], (1, 3)))
    first = [int(np.argmax(steps[:, 0, n] < K)) for n in range(4)]
    assert first == [1, 3, 0, 2]
    np.testing.assert_array_equal(called, np.tile([[4], [3], [2], [1]], (1, 3)))


def test_bound_zero_is_exact_and_no_bound_forgets_what_belongs_together():
    joint, count = joint_of(1), 8_000
    three = schedule.linear(3, K, keep=(2 / 3, 0.0), mask=(1 / 3, 1.0))
    apart = np.einsum("i,j,k->ijk", joint.sum((1, 2)), joint.sum((0, 2)), joint.sum((0, 1)))
    for bound, exact in ((0.0, joint), (np.inf, apart)):
        made = chain(rules.EntropyBound(bound), count, 3, three, conditionals(joint)).codes
        seen, expected = counts(made, K), count * exact.ravel()
        rare = expected < 5
        if rare.any():
            seen, expected = (np.append(x[~rare], x[rare].sum()) for x in (seen, expected))
        assert stats.chisquare(seen, expected).pvalue > 1e-4
    assert 0.5 * np.abs(joint - apart).sum() > 0.2


@jax.jit
def once_each(rule, keys, log_x0, step):
    """Tokens [B, N] after one step of pictures that are all masked; answers [B, N, K]."""
    step_of = jax.vmap(rule, in_axes=(0, 0, None, None, None))
    return step_of(keys, log_x0, jnp.full(log_x0.shape[1], K), step, schedule.released(100, K))


@pytest.mark.parametrize("bound", [0.8, 0.95, 1.9])
def test_what_is_drawn_at_once_misses_less_than_the_bound(bound):
    # Of a hundred times none has to reveal one of three tokens.
    step = rules.Step(*map(jnp.int32, (99, 100, 100, 3)))
    joints = [joint_of(seed) for seed in range(8)]
    answers = [conditionals(joint)(np.full((1, 3), K), None)[0] for joint in joints]
    keys = jax.random.split(jax.random.key(0), 8)
    made = once_each(rules.EntropyBound(bound), keys, jnp.stack(answers), step)
    sizes = set()
    for joint, log_x0, tokens in zip(joints, answers, np.asarray(made), strict=True):
        chosen = np.flatnonzero(tokens < K)
        law = joint.sum(axis=tuple(set(range(3)) - set(chosen)))
        entropies = np.array([stats.entropy(np.exp(x)) for x in np.asarray(log_x0, np.float64)])
        missed = entropies[chosen].sum() - stats.entropy(law.ravel())
        largest = entropies[chosen].sum() - entropies[chosen].max()
        assert missed <= largest + 1e-5 <= bound + 2e-5
        # The next surest one would be too many.
        order = np.argsort(entropies)
        assert set(chosen) == set(order[: len(chosen)])
        if len(chosen) < 3:
            assert entropies[order[: len(chosen)]].sum() > bound
        sizes.add(len(chosen))
    assert len(sizes) > 1
