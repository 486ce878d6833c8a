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


@pytest.mark.parametrize("num_codes", [1000, 1024])
def test_blocks_of_codes_change_nothing(monkeypatch, num_codes):
    rng = np.random.default_rng(7)
    z = rng.normal(size=(2, 8, 8, 6)).astype(np.float32)
    codebook = rng.normal(size=(num_codes, 6)).astype(np.float32)
    # Equal codes in different blocks: the first one is taken.
    codebook[[200, 999]] = z[0, 0, 0]
    state = quantizer.init_codebook(jax.random.key(1), num_codes, 6)
    options = dict(key=jax.random.key(2), revival_threshold=0.1)

    def run(z):
        codes = quantizer.nearest_codes(z, codebook)
        return codes, quantizer.update_codebook(state, z, codes, **options)

    whole = jax.jit(lambda z: run(z))(z)
    monkeypatch.setattr(quantizer, "_LARGEST_ARRAY", 4 * 128 * 150)
    text = jax.jit(lambda z: run(z)).lower(z).as_text()
    assert f"tensor<128x{num_codes}xf32>" not in text and "tensor<128x150xf32>" in text
    blocks = jax.jit(lambda z: run(z))(z)
    np.testing.assert_array_equal(blocks[0], whole[0])
    assert int(whole[0][0, 0, 0]) == 200
    for a, b in zip(jax.tree.leaves(blocks[1]), jax.tree.leaves(whole[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_large_codebook_takes_64_mib():
    z = jax.ShapeDtypeStruct((4096, 8), jnp.float32)
    codebook = jax.ShapeDtypeStruct((16_384, 8), jnp.float32)
    compiled = jax.jit(quantizer.nearest_codes).lower(z, codebook).compile()
    # [M, K] would be 256 MiB.
    assert compiled.memory_analysis().temp_size_in_bytes < 70 * 2**20


def _gumbel(logits, codebook, temperature=0.7, straight_through=False):
    key = jax.random.key(3)
    return quantizer.gumbel_quantize(
        logits, codebook, key, temperature=temperature, straight_through=straight_through
    )


def test_gumbel_values_and_gradients_equal_those_of_pytorch():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    rng = np.random.default_rng(8)
    logits, codebook = (rng.normal(size=s).astype(np.float32) for s in ((2, 5, 11), (11, 4)))
    noise = np.array(jax.random.gumbel(jax.random.key(3), logits.shape, mode="high"))
    for hard in (False, True):

        def loss(logits, codebook, hard=hard):
            z, kl, codes = _gumbel(logits, codebook, straight_through=hard)
            return jnp.sum(jnp.sin(z)) + 5e-4 * kl, (z, codes)

        gradients, (z, codes) = jax.grad(loss, argnums=(0, 1), has_aux=True)(logits, codebook)
        theirs = [torch.tensor(x, requires_grad=True) for x in (logits, codebook)]
        y = functional.softmax((theirs[0] + torch.tensor(noise)) / 0.7, dim=-1)
        index = y.argmax(-1)
        if hard:
            y = functional.one_hot(index, 11).float() - y.detach() + y
        expected = y @ theirs[1]
        share = functional.softmax(theirs[0], dim=-1)
        kl = (share * torch.log(share * 11 + 1e-10)).sum(-1).mean()
        (expected.sin().sum() + 5e-4 * kl).backward()
        np.testing.assert_allclose(z, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(codes, index.numpy())
        for ours, tensor in zip(gradients, theirs, strict=True):
            np.testing.assert_allclose(ours, tensor.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_gumbel_kl_is_that_to_the_uniform_distribution():
    codebook = jnp.eye(8)
    np.testing.assert_allclose(_gumbel(jnp.zeros((3, 8)), codebook)[1], 0.0, atol=1e-6)
    certain = 1e4 * jax.nn.one_hot(jnp.array([1, 5]), 8)
    z, kl, codes = _gumbel(certain, codebook)
    np.testing.assert_allclose(kl, np.log(8), rtol=1e-6)
    np.testing.assert_array_equal(codes, [1, 5])
    np.testing.assert_allclose(z, codebook[codes], atol=1e-6)


def test_straight_through_gives_code_vectors_and_a_low_temperature_nearly_so():
    logits, codebook = jax.random.normal(jax.random.key(0), (64, 9)), jnp.eye(9)
    z, _, codes = _gumbel(logits, codebook, straight_through=True)
    np.testing.assert_allclose(z, codebook[codes], atol=1e-6)
    near, _, same = _gumbel(logits, codebook, temperature=1e-3)
    np.testing.assert_array_equal(same, codes)
    np.testing.assert_allclose(near, codebook[codes], atol=0.05)
    soft = _gumbel(logits, codebook, temperature=1e3)[0]
    np.testing.assert_allclose(soft, 1 / 9, atol=0.005)


def test_gumbel_temperature():
    values = [float(quantizer.gumbel_temperature(jnp.int32(s), 100)) for s in (0, 50, 100, 10**6)]
    np.testing.assert_allclose(values, [1.0, (1 + 1 / 16) / 2, 1 / 16, 1 / 16], rtol=1e-6)
