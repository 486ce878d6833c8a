import jax
import numpy as np
import pytest

from vqd_jax.diffusion import schedule

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.mark.parametrize(("num_steps", "num_codes"), [(100, 2887), (10, 17)])
def test_released_schedule_is_the_published_one(golden, num_steps, num_codes):
    numbers = golden("schedule")
    ours = schedule.released(num_steps, num_codes)
    for name, table in (("a", ours.keep), ("b", ours.replace), ("c", ours.mask)):
        theirs = numbers[f"T{num_steps}_K{num_codes}_cumprod_{name}t_f64"]
        # Their entry -1 is clean data.
        theirs = np.concatenate([theirs[-1:], theirs[:-1]])
        assert table.dtype == np.float32
        np.testing.assert_allclose(table, theirs, rtol=6e-8, atol=0)
        logs = numbers[f"T{num_steps}_K{num_codes}_log_cumprod_{name}t"][:-1]
        np.testing.assert_allclose(np.log(table[1:]), logs, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "mask_at_end", "replaced_at_end"),
    [(schedule.released, 0.99999, 1e-6), (schedule.paper, 0.9, 0.1)],
)
def test_end_points(make, mask_at_end, replaced_at_end):
    s = make(100, 2887)
    assert s.num_steps == 100
    assert s.keep.shape == s.replace.shape == s.mask.shape == (101,)
    np.testing.assert_allclose((s.keep[0], s.replace[0], s.mask[0]), (1, 0, 0), atol=0)
    np.testing.assert_allclose(s.mask[-1], mask_at_end, rtol=1e-6)
    np.testing.assert_allclose(s.replace[-1] * 2887, replaced_at_end, rtol=1e-4)


def test_tables_are_products_of_the_steps(tables, matrices):
    keep, mask = tables
    num_codes = 3
    s = schedule.from_tables(keep, mask, num_codes)
    explicit = matrices(keep, mask, num_codes)
    for t in range(s.num_steps + 1):
        product = explicit.between(0, t)
        assert (product > -1e-15).all()
        np.testing.assert_allclose(product.sum(0), 1, atol=1e-14)
        np.testing.assert_allclose(product[0, 0], s.keep[t] + s.replace[t], atol=1e-7)
        np.testing.assert_allclose(product[1, 0], s.replace[t], atol=1e-7)
        np.testing.assert_allclose(product[num_codes, 0], s.mask[t], atol=1e-7)


@pytest.mark.parametrize("replaced", [0.0, 0.25, 1.0])
def test_cosine(replaced):
    s = schedule.cosine(6, 4, replaced)
    noise = np.array([0, np.sin(np.pi / 12), 0.5, np.sqrt(0.5), np.sqrt(0.75)])
    np.testing.assert_allclose(s.keep[:5], 1 - noise, atol=1e-7)
    np.testing.assert_allclose(s.mask[:5], (1 - replaced) * noise, atol=1e-7)
    np.testing.assert_allclose(4 * s.replace[:5], replaced * noise, atol=1e-7)
    np.testing.assert_allclose(s.keep[6], 0, atol=1e-7)
    with pytest.raises(ValueError, match=r"replaced share .* \[0, 1\], got 1\.1"):
        schedule.cosine(6, 4, 1.1)


def test_one_step_and_two_codes():
    s = schedule.linear(1, 2, keep=(0.25, 0.25), mask=(0.5, 0.5))
    np.testing.assert_allclose((s.keep, s.replace, s.mask), ((1, 0.25), (0, 0.125), (0, 0.5)))


def test_a_schedule_is_a_pytree():
    s = schedule.paper(4, 5)
    doubled = jax.tree.map(lambda x: 2 * x, s)
    assert doubled.num_codes == 5
    np.testing.assert_array_equal(doubled.mask, 2 * s.mask)
    np.testing.assert_allclose(jax.jit(lambda s: s.mask[2])(s), s.mask[2])


@pytest.mark.parametrize(
    ("keep", "mask", "message"),
    [
        ((0.9, 0.1), (0.2, 0.5), r"replace probability at time 1 is -0\.1"),
        ((0.9, 0.1), (0.1, 1.2), r"mask probability at time 4 is 1\.2"),
        ((0.9, -0.1), (0.1, 0.5), r"keep probability at time 4 is -0\.1"),
        ((0.5, 0.1), (0.3, 0.2), r"mask probability falls at time 2: 0\.3"),
        ((0.1, 0.2), (0.1, 0.5), r"keep probability rises at time 2: 0\.1"),
        ((0.5, 0.49), (0.0, 0.5), r"step to time 2 would need a negative replace"),
        ((np.nan, 0.1), (0.1, 0.2), r"keep probability at time 1 is nan"),
    ],
)
def test_impossible_schedules_name_time_and_value(keep, mask, message):
    with pytest.raises(ValueError, match=message):
        schedule.linear(4, 3, keep=keep, mask=mask)


def test_impossible_sizes():
    with pytest.raises(ValueError, match="num_codes >= 2, got 1"):
        schedule.released(10, 1)
    with pytest.raises(ValueError, match="num_steps >= 1, got 0"):
        schedule.released(0, 10)
    with pytest.raises(ValueError, match=r"time 0 is clean data.*0\.9"):
        schedule.from_tables(np.array([0.9, 0.1]), np.array([0.0, 0.5]), 3)
