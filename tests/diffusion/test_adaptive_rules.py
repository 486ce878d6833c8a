"""Rules that look at the network's answer to choose what to draw: proofs at small K and N."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
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


def test_one_token_at_a_time_is_exact_and_all_at_once_forget_what_belongs_together():
    joint, count = joint_of(1), 8_000
    three = schedule.linear(3, K, keep=(2 / 3, 0.0), mask=(1 / 3, 1.0))
    apart = np.einsum("i,j,k->ijk", joint.sum((1, 2)), joint.sum((0, 2)), joint.sum((0, 1)))
    for num_steps, exact in ((3, joint), (1, apart)):
        halton = rules.Halton((1, 3))
        made = chain(halton, count, 3, three, conditionals(joint), num_steps=num_steps).codes
        seen, expected = counts(made, K), count * exact.ravel()
        rare = expected < 5
        if rare.any():
            seen, expected = (np.append(x[~rare], x[rare].sum()) for x in (seen, expected))
        assert stats.chisquare(seen, expected).pvalue > 1e-4
    assert 0.5 * np.abs(joint - apart).sum() > 0.2
