import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vqd_jax.diffusion import draws, schedule, transition

jax.config.update("jax_numpy_rank_promotion", "raise")


def words(seed, *shape):
    return jax.random.bits(jax.random.key(seed), shape)


@pytest.mark.parametrize("num_codes", [2, 3, 10, 49, 50, 2887])
def test_every_code_has_a_place_in_one_block(num_codes):
    blocks, width = draws.block_shape(num_codes)
    assert (blocks - 1) * width < num_codes <= blocks * width
    assert draws.num_words(num_codes) <= 4 * np.sqrt(num_codes) + 4


def test_exponential_is_exponential_to_its_smallest_values():
    e = np.asarray(draws.exponential(words(0, 1_000_000, 2)), np.float64)
    assert stats.kstest(e, "expon").pvalue > 1e-3
    edges = jnp.array([[0, 0], [0, 1 << 31], [1, 0], [2**32 - 1, 2**32 - 1]], jnp.uint32)
    ends = np.asarray(draws.exponential(edges))
    np.testing.assert_allclose(ends[:3], [2.0**-65, 2.0**-33, 2.0**-32], rtol=1e-6)
    assert np.isfinite(ends[3])
    assert ends[3] > 16


@pytest.mark.parametrize("num_codes", [2, 5, 30])
def test_codes_have_their_probabilities(num_codes):
    p = np.random.default_rng(num_codes).dirichlet(np.full(num_codes, 0.5))
    impossible = 1 if num_codes > 2 else []
    p[impossible] = 0
    p /= p.sum()
    log_p = jnp.maximum(jnp.log(jnp.asarray(p, jnp.float32)), transition.LOG_ZERO)
    count = 400_000
    draw = jax.jit(jax.vmap(draws.code, in_axes=(0, None)))
    codes = np.asarray(draw(words(1, count, draws.num_words(num_codes)), log_p))
    counts = np.bincount(codes, minlength=num_codes)
    assert counts.shape == (num_codes,)
    assert not counts[impossible].any()
    likely = p * count > 5
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(p[likely], p[~likely].sum()) * count
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4


def test_any_code_is_uniform():
    codes = np.asarray(draws.any_code(words(2, 300_000), 7))
    assert stats.chisquare(np.bincount(codes, minlength=7)).pvalue > 1e-4


def require_poisson(seen, expected):
    assert stats.poisson.cdf(seen, expected) > 1e-3
    assert stats.poisson.sf(seen - 1, expected) > 1e-3


def code_draws(key, log_p, batch):
    words = jax.random.bits(key, (batch, draws.num_words(log_p.shape[0])))
    return jax.vmap(draws.code, in_axes=(0, None))(words, log_p)


def posterior_draws(key, log_p, batch):
    # At time 0 the posterior is p0, masked or not.
    noise_schedule = schedule.released(10, log_p.shape[0])
    tokens = jnp.where(jnp.arange(batch) % 2 == 0, log_p.shape[0], 5)
    draw = jax.vmap(transition.draw_posterior, in_axes=(0, None, 0, None, None, None))
    return draw(jax.random.split(key, batch), log_p, tokens, 0, 1, noise_schedule)


@pytest.mark.parametrize(
    ("draw_codes", "nats", "rounds"),
    [
        (code_draws, 16.0, 5),
        pytest.param(code_draws, 18.0, 25, marks=pytest.mark.slow),
        pytest.param(code_draws, 20.0, 100, marks=pytest.mark.slow),
        pytest.param(posterior_draws, 18.0, 25, marks=pytest.mark.slow),
        (posterior_draws, 16.0, 5),
    ],
)
def test_tails_have_their_probability(draw_codes, nats, rounds):
    # 2886 codes, each ``nats`` less likely than the last one.
    num_codes, batch = 2887, 25_000
    log_p = jax.nn.log_softmax(jnp.full(num_codes, -nats).at[1000].set(0.0))
    count = jax.jit(lambda seed: jnp.sum(draw_codes(jax.random.key(seed), log_p, batch) != 1000))
    tail = (num_codes - 1) * np.exp(-nats)
    expected = batch * rounds * tail / (1 + tail)
    assert expected > 10
    require_poisson(sum(int(count(seed)) for seed in range(rounds)), expected)


@pytest.mark.slow
def test_noise_of_one_in_a_million_comes_once_in_a_million():
    noise_schedule = schedule.released(100, 5)

    @jax.jit
    def count(seed):
        keys = jax.random.split(jax.random.key(seed), 500_000)
        x = jax.vmap(transition.q_sample, in_axes=(0, None, None, None))(keys, 2, 1, noise_schedule)
        return jnp.sum(x == 5), jnp.sum((x != 2) & (x != 5))

    rounds = 16
    masked, replaced = np.sum([count(seed) for seed in range(rounds)], axis=0)
    require_poisson(masked, 9e-6 * rounds * 500_000)
    require_poisson(replaced, 0.8e-6 * rounds * 500_000)
