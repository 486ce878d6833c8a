"""The rows of the table of sampling, and its errors."""

import numpy as np

from vqd_jax.diffusion import choices, rules, schedule


def test_every_row_changes_what_it_names(benchmark):
    script = benchmark("sampling")
    noise = schedule.released(100, 16)
    made = {row: choices.settings(noise, (2, 2), **script.options_of(row)) for row in script.ROWS}
    base, *others = made
    assert made[base].num_steps == 25 and made[base].guidance is None
    assert np.isclose(made[base].truncation, 0.9)
    for row in others:
        changed = made[row]
        if row.endswith("steps") and row[0].isdigit():
            assert changed.num_steps == int(row.split()[0])
        if row.startswith("published fast"):
            assert isinstance(changed.rule, rules.PublishedFast)
            # The calls that its name says.
            assert f"({len(changed.times) - 1} calls)" in row
        if "truncation" in row and "none" not in row:
            assert np.isclose(changed.truncation, float(row.split()[-1]))
        if row.startswith("guidance"):
            scale = float(row.split()[1].strip(","))
            assert np.isclose(np.max(changed.guidance), scale)
    assert made["truncation 1 (none)"].truncation is None
    first = np.asarray(made["guidance 3, first half of the steps"].guidance)
    second = np.asarray(made["guidance 3, second half of the steps"].guidance)
    # Step 13 of 25 lies on the border, and is in the second half.
    np.testing.assert_array_equal(first == 3, np.arange(25) < 12)
    np.testing.assert_array_equal(second == 3, np.arange(25) >= 12)


def test_the_larger_error_counts(benchmark):
    percent = benchmark("sampling").percent
    # The standard deviation of 0, 1, 1, 1 is 0.5.
    assert percent(np.array([[1, 0, 1, 1]])) == "75.0 ± 25.0"
    # Of means 1 and 0 it is 0.71, of all pictures 0.53.
    assert percent(np.array([[1, 1, 1, 1], [0, 0, 0, 0]]), "+") == "+50.0 ± 50.0"
    # Two models agree, and their pictures do not.
    values = np.array([[1, 0, 0, 1], [0, 1, 0, 1]])
    assert percent(values) == f"50.0 ± {100 * np.sqrt(2 / 7 / 8):.1f}"
