import itertools

import grain
import jax
import numpy as np
import pytest

from vqd_jax.data import order
from vqd_jax.errors import UserError


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def batches(places, count, batch_size, process=(0, 1)):
    def make(local):
        return local.batch(batch_size, batch_fn=np.array).to_iter_dataset()

    return order.Batches(places, make, count, batch_size, *process)


def test_uniforms_are_uniform_and_independent_of_the_batch():
    keys = np.arange(20_000)
    numbers = order.uniforms(3, keys, 4)
    assert numbers.shape == (4, 20_000)
    assert 0 <= numbers.min() < numbers.max() < 1
    # Twenty bins of 4000 +- 62.
    assert np.abs(np.histogram(numbers, 20, (0, 1))[0] - 4000).max() < 5 * 62
    assert np.abs(np.corrcoef(numbers) - np.eye(4)).max() < 0.03
    np.testing.assert_array_equal(numbers[:, 500:510], order.uniforms(3, keys[500:510], 4))
    assert not (order.uniforms((3, 1), keys[:9], 4) == numbers[:, :9]).any()


def test_every_epoch_has_every_record_in_a_new_order():
    keys = np.array([order.shuffled([30], 7)[place] for place in range(90)])
    for epoch in range(3):
        part = keys[30 * epoch : 30 * epoch + 30]
        assert sorted(part) == list(range(30 * epoch, 30 * epoch + 30))
    assert not (keys[:30] == keys[30:60] - 30).all()


def test_mixed_sets_keep_their_share_and_their_epochs():
    places = order.shuffled([40, 7, 3], 0, [5, 3, 2])
    elements = np.array([places[place] for place in range(400)])
    sets, keys = order.split_keys(elements, 3)
    assert np.bincount(sets).tolist() == [200, 120, 80]
    # At no moment is a set behind its share by more than one record.
    for s, (share, count) in enumerate(((0.5, 40), (0.3, 7), (0.2, 3))):
        due = share * np.arange(1, 401)
        assert np.abs(np.cumsum(sets == s) - due).max() <= 1
        mine = keys[sets == s]
        whole = len(mine) // count * count
        assert sorted(mine[:whole]) == list(range(whole))


def _drawn(weights, places, seed=3):
    order_ = order.shuffled([len(weights)], seed, record_weights=weights)
    return np.array([order_[place] for place in range(places)])


def test_records_come_as_often_as_their_weights_say():
    weights = np.array([5.0, 1.0, 1.0, 0.5, 0.5, 2.0])
    keys = _drawn(weights, 600)
    assert len(set(keys.tolist())) == 600
    drawn = keys.reshape(100, 6) % 6
    due = 6 * weights / weights.sum()
    for epoch in drawn:
        counts = np.bincount(epoch, minlength=6)
        assert (np.floor(due) <= counts).all() and (counts <= np.ceil(due)).all()
    # In 100 epochs a record is never more than two draws from its share.
    assert np.abs(np.bincount(drawn.reshape(-1), minlength=6) - 100 * due).max() < 2


def test_a_record_of_weight_0_is_left_out():
    drawn = _drawn(np.array([0.0, 1.0, 0.0, 1.0, 1.0, 0.0]), 600) % 6
    assert np.bincount(drawn, minlength=6).tolist() == [0, 200, 0, 200, 200, 0]


def test_equal_weights_leave_every_epoch_whole():
    drawn = _drawn(np.ones(30), 90).reshape(3, 30) % 30
    assert (np.sort(drawn) == np.arange(30)).all()
    assert not (drawn[0] == drawn[1]).all()


def test_groups_are_balanced_by_a_power_of_their_sizes():
    groups = ["hand"] * 16 + ["sun"] + ["cat"] * 4
    for power, shares in ((1, (16, 1, 4)), (0.5, (4, 1, 2)), (0, (1, 1, 1))):
        weights = order.balanced_weights(groups, power)
        found = [weights[:16].sum(), weights[16], weights[17:].sum()]
        np.testing.assert_allclose(found, shares)
        drawn = _drawn(weights, 21 * 40) % 21
        counts = np.array([(drawn < 16).sum(), (drawn == 16).sum(), (drawn > 16).sum()])
        np.testing.assert_allclose(counts / counts.sum(), np.array(shares) / sum(shares), atol=2e-3)


def test_a_balanced_set_may_be_mixed_with_another():
    weights = order.balanced_weights(["a"] * 9 + ["b"], 0.0)
    places = order.shuffled([10, 5], 0, [2, 1], weights)
    sets, keys = order.split_keys(np.array([places[place] for place in range(300)]), 2)
    assert np.bincount(sets).tolist() == [200, 100]
    # An interval that ends where a point lies may lose it to rounding.
    assert abs(np.bincount(keys[sets == 0] % 10)[9] - 100) <= 1
    assert np.bincount(keys[sets == 1] % 5).tolist() == [20] * 5


def test_weights_of_another_number_of_records_are_refused():
    with pytest.raises(UserError, match="3 weights do not fit 4 records"):
        order.shuffled([4], 0, record_weights=np.ones(3))


def test_without_weights_sets_count_by_their_records():
    places = order.shuffled([30, 10], 0)
    sets = np.array([places[place] for place in range(40)]) % 2
    assert sets.sum() == 10


@pytest.mark.parametrize("weights", [[1], [1, -1], [1, float("inf")]])
def test_impossible_weights_are_named(weights):
    with pytest.raises(UserError, match="one positive number to each data set"):
        order.shuffled([3, 3], 0, weights)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_processes_share_every_batch_of_one(count):
    places = order.shuffled([50], 1)
    whole = np.array(take(iter(batches(places, 50, 12)), 9))
    parts = [take(iter(batches(places, 50, 12 // count, (p, count))), 9) for p in range(count)]
    np.testing.assert_array_equal(whole, np.concatenate(parts, axis=1))


def test_a_single_pass_ends_together_on_all_processes():
    places = grain.MapDataset.range(50)
    parts = [list(batches(places, 50, 4, (p, 3))) for p in range(3)]
    assert [len(part) for part in parts] == [4, 4, 4]
    assert sorted(np.concatenate(parts, axis=None)) == list(range(48))


def put(iterator):
    return jax.device_put(next(iterator))


def test_batches_on_device_are_the_batches_and_count_what_was_handed_out():
    places = order.shuffled([50], 1)
    expected = take(iter(batches(places, 50, 10)), 9)
    there = order.Ahead(iter(batches(places, 50, 10)), put, ahead=3)
    first = take(there, 4)
    assert all(isinstance(batch, jax.Array) for batch in first)
    state = there.get_state()
    assert state == {"records": 40}
    take(there, 3)
    there.set_state(state)
    np.testing.assert_array_equal(np.array(expected), np.array(first + take(there, 5)))


def test_a_single_pass_on_device_ends():
    made = list(order.Ahead(iter(batches(grain.MapDataset.range(10), 10, 5)), put, ahead=4))
    assert np.array(made).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
