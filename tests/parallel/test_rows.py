"""Rows in batches of one size."""

import math

import numpy as np
import pytest

from vqd_jax.parallel import rows


def test_padding_repeats_the_first_row():
    tree = {"ids": np.array([[1, 2], [3, 4]]), "weight": np.array([0.5, 0.25])}
    padded = rows.padded(tree, 4)
    assert padded["ids"].tolist() == [[1, 2], [3, 4], [1, 2], [1, 2]]
    assert padded["weight"].tolist() == [0.5, 0.25, 0.5, 0.5]
    assert rows.padded(tree, 2)["ids"] is tree["ids"]


@pytest.mark.parametrize(
    "num_rows, largest, multiple_of, size",
    [
        (20, 16, 1, 10),
        (16, 16, 1, 16),
        (17, 16, 1, 9),
        (1, 16, 1, 1),
        (1, 16, 8, 8),
        (33, 16, 4, 12),
    ],
)
def test_even_sizes(num_rows, largest, multiple_of, size):
    assert rows.even_size(num_rows, largest, multiple_of) == size


def test_even_sizes_waste_less_than_a_row_of_every_batch():
    for num_rows in range(1, 70):
        for largest in (1, 3, 8, 64):
            size = rows.even_size(num_rows, largest)
            count = math.ceil(num_rows / size)
            assert size <= largest and count == math.ceil(num_rows / largest)
            assert 0 <= count * size - num_rows < count


def test_batches_have_one_shape_and_every_row_once():
    tree = {"ids": np.arange(14).reshape(7, 2), "weight": np.arange(7.0)}
    parts = list(rows.batches(tree, 3))
    assert [count for _, count in parts] == [3, 3, 1]
    assert all(part["ids"].shape == (3, 2) and part["weight"].shape == (3,) for part, _ in parts)
    back = np.concatenate([part["ids"][:count] for part, count in parts])
    assert (back == tree["ids"]).all()


def test_a_function_over_all_rows_sees_one_shape():
    shapes = []

    def run(part):
        shapes.append(part.shape)
        return 2 * part[:, 0]

    values = np.arange(10.0).reshape(5, 2)
    assert rows.in_batches(run, values, 2).tolist() == [0.0, 4.0, 8.0, 12.0, 16.0]
    assert set(shapes) == {(2, 2)} and len(shapes) == 3
