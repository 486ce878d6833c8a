"""Rows in batches of one size."""

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
    ("largest", "multiple_of", "sizes"),
    [
        (16, 1, [16, 4, 1]),
        (64, 1, [64, 16, 4, 1]),
        (1, 1, [1]),
        (10, 1, [10, 3, 1]),
        (16, 8, [16, 8]),
    ],
)
def test_batches_have_few_sizes(largest, multiple_of, sizes):
    assert rows.sizes(largest, multiple_of) == sizes


def test_few_shapes_hold_every_row_once_and_waste_little():
    for num_rows in range(1, 70):
        for largest in (1, 3, 8, 16, 64):
            parts = list(rows.few_shapes({"x": np.arange(num_rows)}, largest))
            found = [part["x"][: len(numbers)] for part, numbers in parts]
            assert np.concatenate(found).tolist() == list(range(num_rows))
            assert [number for _, numbers in parts for number in numbers] == list(range(num_rows))
            assert {len(part["x"]) for part, _ in parts} <= set(rows.sizes(largest))
            assert 3 * sum(len(part["x"]) for part, _ in parts) <= 4 * num_rows


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
