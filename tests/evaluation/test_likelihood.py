import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqd_jax.evaluation.likelihood import caption_likelihood, derangement


@pytest.mark.parametrize("count", [2, 3, 10, 176])
def test_derangement_moves_everything(count):
    order = derangement(count, seed=3)
    assert sorted(order) == list(range(count))
    assert not np.any(order == np.arange(count))


def test_right_and_shuffled_are_paired_and_the_last_batch_is_whole():
    count = 10
    codes = np.arange(count, dtype=np.int32)[:, None]

    def bits(key, codes, ids):
        # Common noise, which only a paired difference takes out.
        noise = 5 * jax.random.normal(key, ())
        return noise + jnp.abs(codes[:, 0] - ids[:, 0]) + 2.0

    result = caption_likelihood(bits, codes, codes, seed=0, batch_size=4)
    gap = np.abs(derangement(count, 0) - np.arange(count))
    noise = [5 * jax.random.normal(jax.random.fold_in(jax.random.key(0), b), ()) for b in range(3)]
    expected = np.mean(np.repeat(noise, [4, 4, 2])) + 2.0
    assert result.right == pytest.approx(expected, abs=1e-5)
    assert result.shuffled == pytest.approx(expected + gap.mean(), abs=1e-5)
    error = gap.std(ddof=1) / np.sqrt(count)
    assert result.difference_in_standard_errors == pytest.approx(gap.mean() / error, rel=1e-5)
