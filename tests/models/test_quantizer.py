"""Nearest codes against brute force; the moving-average codebook against its formula by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqd_jax.models import quantizer

jax.config.update("jax_numpy_rank_promotion", "raise")


def test_nearest_codes_equal_brute_force():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(3, 5, 7, 6)).astype(np.float32)
    codebook = rng.normal(size=(40, 6)).astype(np.float32)
    exact = z.astype(np.float64)[..., None, :] - codebook.astype(np.float64)
    expected = np.argmin(np.sum(exact**2, axis=-1), axis=-1)
    codes = quantizer.nearest_codes(z, codebook)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, expected)


def test_a_code_is_nearest_to_itself_and_ties_go_to_the_smaller_index():
    codebook = jnp.array([[0.0, 1.0], [2.0, 0.0], [2.0, 0.0], [-1.0, -1.0]])
    codes = quantizer.nearest_codes(codebook, codebook)
    np.testing.assert_array_equal(codes, [0, 1, 1, 3])
    np.testing.assert_array_equal(quantizer.lookup(codes, codebook), codebook)


def test_lookup_keeps_the_shape_of_the_codes():
    codebook = jnp.arange(12.0).reshape(4, 3)
    vectors = quantizer.lookup(jnp.array([[3, 0], [1, 1]]), codebook)
    np.testing.assert_array_equal(vectors[0, 0], [9.0, 10.0, 11.0])
    assert vectors.shape == (2, 2, 3)


def test_mismatched_dimensions_are_refused():
    with pytest.raises(AssertionError):
        quantizer.nearest_codes(jnp.zeros((2, 3)), jnp.zeros((4, 5)))
    with pytest.raises(AssertionError):
        state = quantizer.init_codebook(jax.random.key(0), 4, 3)
        quantizer.update_codebook(
            state, jnp.zeros((2, 3)), jnp.zeros(3, jnp.int32), key=jax.random.key(0)
        )


def test_moving_average_by_hand():
    state = quantizer.CodebookState(
        codebook=jnp.array([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]),
        cluster_size=jnp.array([4.0, 2.0, 1.0]),
        cluster_sum=jnp.array([[4.0, 0.0], [0.0, 2.0], [5.0, 5.0]]),
    )
    z = jnp.array([[2.0, 1.0], [0.0, 3.0], [1.0, 1.0]])
    codes = jnp.array([0, 1, 0])
    new = quantizer.update_codebook(state, z, codes, key=jax.random.key(0), decay=0.9, epsilon=0.5)
    size = np.array([0.9 * 4 + 0.1 * 2, 0.9 * 2 + 0.1 * 1, 0.9 * 1])
    sums = np.array([[0.9 * 4 + 0.1 * 3, 0.1 * 2], [0.0, 0.9 * 2 + 0.1 * 3], [4.5, 4.5]])
    smoothed = (size + 0.5) / (size.sum() + 3 * 0.5) * size.sum()
    np.testing.assert_allclose(new.cluster_size, size, rtol=1e-6)
    np.testing.assert_allclose(new.cluster_sum, sums, rtol=1e-6)
    np.testing.assert_allclose(new.codebook, sums / smoothed[:, None], rtol=1e-6)


def test_codebook_converges_to_the_cluster_means():
    centres = jnp.array([[3.0, 0.0], [0.0, 3.0], [-3.0, -3.0]])
    state = quantizer.init_codebook(jax.random.key(1), 3, 2)

    def step(state, key):
        labels = jnp.arange(60) % 3
        z = centres[labels] + 0.1 * jax.random.normal(key, (60, 2))
        codes = quantizer.nearest_codes(z, state.codebook)
        state = quantizer.update_codebook(
            state, z, codes, key=key, decay=0.8, revival_threshold=0.1
        )
        return state, None

    state, _ = jax.lax.scan(step, state, jax.random.split(jax.random.key(2), 100))
    found = np.asarray(state.codebook)
    gap = np.linalg.norm(found[:, None] - np.asarray(centres)[None], axis=-1)
    np.testing.assert_allclose(gap.min(axis=0), 0.0, atol=0.05)
    np.testing.assert_allclose(state.cluster_size, 20.0, rtol=1e-3)


def test_only_dead_codes_are_revived_and_from_latents_of_the_batch():
    state = quantizer.CodebookState(
        codebook=jnp.array([[0.0, 0.0], [50.0, 50.0], [1.0, 1.0], [60.0, 60.0]]),
        cluster_size=jnp.array([3.0, 0.01, 3.0, 0.02]),
        cluster_sum=jnp.array([[0.0, 0.0], [0.5, 0.5], [3.0, 3.0], [1.2, 1.2]]),
    )
    z = jnp.array([[0.0, 0.0], [0.0, 0.2], [1.0, 1.0], [9.0, -9.0], [-8.0, 8.0], [1.0, 1.1]])
    codes = quantizer.nearest_codes(z, state.codebook)
    arguments = dict(key=jax.random.key(3), revival_threshold=0.1)
    new = quantizer.update_codebook(state, z, codes, **arguments)
    plain = quantizer.update_codebook(state, z, codes, key=jax.random.key(3))
    np.testing.assert_array_equal(new.codebook[::2], plain.codebook[::2])
    np.testing.assert_array_equal(plain.codebook[1] > 40.0, [True, True])
    # Latents already on a code have no chance; these two are almost all of the error.
    revived = {tuple(row) for row in np.asarray(new.codebook[1::2]).tolist()}
    assert revived == {(9.0, -9.0), (-8.0, 8.0)}
    np.testing.assert_allclose(new.cluster_size[1::2], 6 / 4)
    np.testing.assert_allclose(new.cluster_sum[1::2], 1.5 * new.codebook[1::2])
    again = quantizer.update_codebook(state, z, codes, **arguments)
    np.testing.assert_array_equal(new.codebook, again.codebook)


def test_an_unused_codebook_is_seeded_entirely_from_the_first_batch():
    z = jax.random.normal(jax.random.key(4), (5, 3)) + 100.0
    state = quantizer.init_codebook(jax.random.key(5), 8, 3)
    codes = quantizer.nearest_codes(z, state.codebook)
    new = quantizer.update_codebook(state, z, codes, key=jax.random.key(6), revival_threshold=0.1)
    rows = {tuple(row) for row in np.asarray(z).tolist()}
    # Fewer latents than codes: every latent is taken before any is taken twice.
    assert {tuple(row) for row in np.asarray(new.codebook).tolist()} == rows


def test_code_usage():
    perplexity, used = quantizer.code_usage(jnp.array([[0, 0], [3, 3]]), 8)
    np.testing.assert_allclose(perplexity, 2.0, rtol=1e-6)
    assert float(used) == 2.0
    perplexity, used = quantizer.code_usage(jnp.arange(8), 8)
    np.testing.assert_allclose(perplexity, 8.0, rtol=1e-6)
    assert float(used) == 8.0


def test_gumbel_codes_are_the_most_likely_or_drawn():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.05, 0.05, 0.9]]))
    np.testing.assert_array_equal(quantizer.draw_codes(logits), [0, 2])
    draws = quantizer.draw_codes(
        jnp.broadcast_to(logits[:, None], (2, 20_000, 3)), jax.random.key(0)
    )
    share = np.stack([np.bincount(row, minlength=3) / row.size for row in np.asarray(draws)])
    # Four standard deviations of a share of 20,000 draws.
    np.testing.assert_allclose(share, np.exp(logits), atol=0.014)
    again = quantizer.draw_codes(logits, jax.random.key(0))
    np.testing.assert_array_equal(again, quantizer.draw_codes(logits, jax.random.key(0)))
