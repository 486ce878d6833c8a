"""Distances against reference formulas, known values, and the spread of repeated draws."""

import numpy as np
import pytest
import scipy.linalg

from vqd_jax.errors import UserError
from vqd_jax.evaluation import distances


def draw(seed, count, dim, scale=1.0, shift=0.0):
    return scale * np.random.default_rng(seed).normal(size=(count, dim)) + shift


def reference(features):
    return distances.Reference(features.mean(axis=0), np.cov(features.T))


def frechet_by_formula(x, y):
    mean = np.square(x.mean(0) - y.mean(0)).sum()
    first, second = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(first @ second).real
    return mean + np.trace(first + second - 2 * root)


def test_frechet_distance_is_that_of_the_formula():
    x, y = draw(0, 300, 20), draw(1, 200, 20, 1.5, 0.2) @ draw(2, 20, 20)
    moments = distances.joined(distances.group_moments(np.array_split(y, 7), 20))
    np.testing.assert_allclose(moments.mean, y.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(y.T), rtol=1e-9, atol=1e-12)
    found = reference(x).of_moments(moments)
    assert found == pytest.approx(frechet_by_formula(x, y), rel=1e-9)
    assert reference(x).of_moments(distances.Moments.of(x)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_pytorch_fids_and_torch_fidelitys():
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = draw(0, 400, 32), draw(1, 400, 32, 1.2, 0.1)
    statistics = [(features.mean(axis=0), np.cov(features.T)) for features in (x, y)]
    found = reference(x).distance(*statistics[1])
    (mean_x, cov_x), (mean_y, cov_y) = statistics
    theirs = fid_score.calculate_frechet_distance(mean_x, cov_x, mean_y, cov_y)
    assert found == pytest.approx(theirs, rel=1e-6)
    named = [{"mu": mean, "sigma": cov} for mean, cov in statistics]
    theirs = metric_fid.fid_statistics_to_metric(*named, verbose=False)
    (value,) = theirs.values()
    assert found == pytest.approx(value, rel=1e-6)


def test_a_singular_covariance_is_no_trouble_for_the_root():
    x, y = draw(0, 5, 8), draw(1, 6, 8)
    assert reference(x).of_moments(distances.Moments.of(x)) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(reference(x).of_moments(distances.Moments.of(y)))
    with pytest.raises(UserError, match="8 pictures are too few for a covariance of 8 features"):
        distances.require_covariance(8, 8, "pictures")


def test_groups_do_not_depend_on_how_many_follow():
    long = distances.groups(57)
    np.testing.assert_array_equal(distances.groups(23), long[:23])
    np.testing.assert_array_equal(
        np.sort(long[:50].reshape(5, 10)), np.arange(10)[None].repeat(5, 0)
    )


def test_kid_is_the_mean_over_pairs():
    metric_kid = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = draw(0, 60, 5), draw(1, 60, 5, 1.3)
    kernel = [distances.polynomial_kernel(a, b) for a, b in ((x, x), (x, y), (y, y))]
    found = distances.kid(x, y)
    assert found.value == pytest.approx(metric_kid.mmd2(*kernel), rel=1e-9)
    options = {"kid_subsets": 1, "kid_subset_size": 60, "verbose": False}
    torch = pytest.importorskip("torch")
    theirs = metric_kid.kid_features_to_metric(torch.tensor(x), torch.tensor(y), **options)
    assert found.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)


def test_cmmd_is_the_formula_with_the_diagonal():
    x, y = draw(0, 37, 6), draw(1, 22, 6, 1.3)
    x, y = (features / np.linalg.norm(features, axis=1, keepdims=True) for features in (x, y))

    def mean(a, b):
        apart = np.square(a[:, None] - b[None]).sum(axis=-1)
        return np.exp(-apart / 200).mean()

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert distances.cmmd(x, y).value == pytest.approx(expected, rel=1e-9)


def brute_force(real, made, k):
    """Precision, recall, density and coverage, written as the papers define them."""

    def norm(a, b):
        return float(np.sqrt(np.square(a - b).sum()))

    def radius(points, own):
        return sorted(norm(own, other) for other in points)[k]

    balls, of_made = [radius(real, r) for r in real], [radius(made, m) for m in made]
    inside = np.array([[norm(r, m) < b for m in made] for r, b in zip(real, balls, strict=True)])
    back = np.array([[norm(r, m) < b for m, b in zip(made, of_made, strict=True)] for r in real])
    return {
        "precision": inside.any(axis=0).mean(),
        "recall": back.any(axis=1).mean(),
        "density": inside.sum() / (k * len(made)),
        "coverage": inside.any(axis=1).mean(),
    }


def test_neighbour_metrics_are_those_of_the_papers():
    real, made = draw(0, 40, 3), draw(1, 30, 3, 0.7, 1.2)
    few, more = brute_force(real, made, 3), brute_force(real, made, 5)
    found = distances.neighbour_metrics(made, real)
    assert all(0 < few[name] < 1 for name in ("precision", "recall")) and more["coverage"] < 1
    for name, expected in (*list(few.items())[:2], *list(more.items())[2:]):
        assert found[name].value == pytest.approx(expected, abs=1e-12), name
    with pytest.raises(UserError, match="5 generated and 40 real pictures are too few"):
        distances.neighbour_metrics(made[:5], real)


def test_copies_are_noticed():
    training, fresh = draw(0, 300, 4), draw(1, 200, 4)
    spacing = distances.nearest(training, training, same=True)
    assert (spacing.index != np.arange(300)).all() and spacing.distance.min() > 0
    expected = np.linalg.norm(training[7] - np.delete(training, 7, 0), axis=1).min()
    assert spacing.distance[7] == pytest.approx(expected, rel=1e-12)
    copies = training[:50].astype(np.float32).astype(np.float64)
    found = distances.nearest(training[:50], training)
    assert (found.distance == 0).all() and (found.index == np.arange(50)).all()
    assert distances.is_copy(found, spacing.distance).all()
    near = distances.nearest(copies + 1e-3, training)
    assert distances.is_copy(near, spacing.distance).mean() > 0.95
    share = distances.is_copy(distances.nearest(fresh, training), spacing.distance).mean()
    assert 0.2 < share < 0.6


def test_errors_are_the_spread_of_repeated_draws():
    real = draw(0, 2000, 4)
    against, some, found = reference(real), real[:200], {}
    for seed in range(1, 61):
        made = draw(seed, 200, 4, 1.2, 0.1)
        values = distances.frechet(distances.group_moments([made], 4), against)
        values |= distances.neighbour_metrics(made, some) | {"kid": distances.kid(made, some)}
        for name, estimate in values.items():
            found.setdefault(name, []).append(estimate)
    for name, estimates in found.items():
        values, errors = np.array(estimates).T
        # 60 draws tell a spread to about 10 %, ten groups an error to about 25 %.
        ratio = np.sqrt(np.square(errors).mean()) / values.std(ddof=1)
        # Some are on the safe side: without a group, the line of the extrapolation begins farther
        # from 1/N = 0, and recall and coverage lose pictures that others would stand in for.
        on_the_safe_side = name in ("frechet_extrapolated", "recall", "coverage")
        assert 0.8 < ratio < (2.0 if on_the_safe_side else 1.25), (name, ratio)


def test_the_extrapolation_is_what_endless_pictures_give():
    against = reference(draw(0, 5000, 16))
    estimates = [
        distances.frechet(distances.group_moments([draw(seed, 200, 16, 1.2)], 16), against)
        for seed in range(1, 21)
    ]
    plain, at_zero = (
        np.mean([e[name].value for e in estimates]) for name in ("frechet", "frechet_extrapolated")
    )
    true = against.of_moments(distances.Moments.of(draw(99, 400_000, 16, 1.2)))
    assert plain - true > 0.5 and abs(at_zero - true) < 0.15 * (plain - true)
