"""Figures of pictures and features against formulas and made-up cases whose answer is known."""

import numpy as np
import pytest
from scipy import ndimage

from vqd_jax.data.sets import shapes_text
from vqd_jax.errors import UserError
from vqd_jax.evaluation import measures
from vqd_jax.evaluation.features import random_net
from vqd_jax.evaluation.pictures import BLOCK, Extractor, Stored


def stored(folder, *blocks):
    paths, count = [], 0
    for block in blocks:
        paths.append(folder / f"{len(list(folder.iterdir())):03d}.npy")
        np.save(paths[-1], np.asarray(block, np.float32))
        count += len(block)
    return Stored(paths, np.shape(blocks[0])[1], count)


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


class Synthetic:
    """Pictures whose values are their numbers; it counts what is read."""

    def __init__(self, count):
        self.count, self.seen, self.identity = count, [], {"synthetic": 1}

    def __len__(self):
        return self.count

    def read(self, places):
        self.seen += list(places)
        return np.stack([np.full((8, 8, 3), place % 251, np.uint8) for place in places])


def test_features_of_a_block_are_computed_once(tmp_path):
    extractor = Extractor(random_net(size=8), tmp_path)
    pictures = Synthetic(BLOCK + 10)
    first = extractor.stored(pictures, "").all()
    assert pictures.seen == list(range(BLOCK + 10)) and first.shape == (BLOCK + 10, 512)
    longer = Synthetic(2 * BLOCK)
    found = extractor.stored(longer, "")
    assert longer.seen == list(range(BLOCK, 2 * BLOCK))
    np.testing.assert_array_equal(found.all()[: BLOCK + 10], first)
    np.testing.assert_array_equal(found.take([3, BLOCK + 1]), first[[3, BLOCK + 1]])


def test_statistics_count_repeated_pictures(tmp_path):
    x = noise(0, 30, 4)
    times = np.array([3] * 10 + [2] * 20)
    found = measures.statistics(stored(tmp_path, x[:12], x[12:]), times)
    repeated = x.astype(np.float32).astype(float).repeat(times, axis=0)
    np.testing.assert_allclose(found.mean, repeated.mean(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(repeated.T), rtol=1e-9, atol=1e-12)
    assert found.count == 70


def test_statistics_of_other_programs_are_read(tmp_path):
    mean, covariance = noise(0, 4), np.eye(4)
    np.savez(tmp_path / "fid.npz", mu=mean, sigma=covariance)
    np.savez(tmp_path / "adm.npz", mu=mean, sigma=covariance, mu_s=mean[:2], sigma_s=np.eye(2))
    for name in ("fid", "adm"):
        found = measures.read_statistics(tmp_path / f"{name}.npz", 4)
        np.testing.assert_array_equal(found.mean, mean)
    with pytest.raises(UserError, match="the features are 5"):
        measures.read_statistics(tmp_path / "fid.npz", 5)
    np.savez(tmp_path / "other.npz", arr_0=mean)
    (tmp_path / "no.npz").write_bytes(b"PK")
    for name in ("other", "no", "missing"):
        with pytest.raises(UserError, match="cannot be read as statistics"):
            measures.read_statistics(tmp_path / f"{name}.npz", 4)


def test_retrieval_counts_ranks(tmp_path):
    pool = noise(0, 20, 6)
    made = np.concatenate([pool[[4, 7]] + 1e-3, pool[[1]]])
    records = np.array([104, 100, 999])
    found = measures.retrieval(
        stored(tmp_path, made), records, stored(tmp_path, pool), 100 + np.arange(20)
    )
    # The first is found, the second looks like another one, the third is not among them.
    assert found["retrieval_1"].value == 0.5
    assert (
        measures.retrieval(
            stored(tmp_path, made), np.full(3, -1), stored(tmp_path, pool), np.arange(20)
        )
        == {}
    )


def test_clip_score_is_a_mean_of_cosines(tmp_path):
    images, texts = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (noise(0, 5, 3), noise(1, 2, 3))
    )
    expected = [100 * max(float(images[k] @ texts[k % 2]), 0) for k in range(5)]
    found = measures.clip_score(stored(tmp_path, images[:3], images[3:]), texts)
    assert found.value == pytest.approx(np.mean(expected), rel=1e-5)


def test_copies_stand_out(tmp_path):
    training, fresh = noise(0, 200, 4), noise(1, 100, 4)
    copied = measures.Copies(stored(tmp_path, training))
    half = np.concatenate([training[:50], fresh[:50]])
    assert copied.share(stored(tmp_path, half)).value > 0.5 + 0.1
    assert copied.share(stored(tmp_path, fresh)).value < 0.6
    places, ratios = copied.neighbours(half, 3)
    np.testing.assert_array_equal(places[:50, 0], np.arange(50))
    # Features are kept in float32.
    assert ratios[:50].max() < 1e-5 and ratios[50:].min() > 1e-3


def test_sharpness_is_the_squared_difference_of_neighbours():
    pictures = np.zeros((2, 3, 4, 3), np.uint8)
    # One step of 6 in each row, of the 3 between 4 columns: 36 / 3; none between rows.
    pictures[:, :, 2:] = 6
    assert measures.sharpness(pictures) == 12.0
    assert measures.sharpness(pictures.swapaxes(1, 2)) == 12.0
    blurred = np.array(pictures)
    blurred[:, :, 1] = 3
    assert measures.sharpness(blurred) == (9 + 9) / 3


def test_psnr_and_ssim():
    first = np.random.default_rng(0).integers(0, 200, (2, 24, 24, 3)).astype(np.uint8)
    second = first + np.uint8(10)
    np.testing.assert_allclose(measures.psnr(first, second), 10 * np.log10(255**2 / 100))
    np.testing.assert_allclose(measures.psnr(first, first), 100)
    np.testing.assert_allclose(measures.ssim(first, first), 1)
    noisy = np.clip(first + noise(1, *first.shape) * 20, 0, 255).astype(np.uint8)
    # Each window by itself: its mean, variances and covariance under Gaussian weights.
    place = np.arange(11) - 5
    weights = np.exp(-(place**2) / (2 * 1.5**2))
    weights = np.outer(weights, weights) / np.outer(weights, weights).sum()
    values, c1, c2 = [], 2.55**2, 7.65**2
    for y in range(14):
        for x in range(14):
            a, b = (p[0, y : y + 11, x : x + 11, 0].astype(float) for p in (first, noisy))
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
            cov = (weights * (a - ma) * (b - mb)).sum()
            values.append(
                (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
            )
    found = measures.ssim(first[:1, ..., :1].repeat(3, -1), noisy[:1, ..., :1].repeat(3, -1))
    assert found[0] == pytest.approx(np.mean(values), rel=1e-6)
    blurred = ndimage.gaussian_filter(first.astype(float), (0, 1, 1, 0)).astype(np.uint8)
    assert measures.ssim(first, blurred).max() < 0.7


def test_attributes_of_true_pictures_are_right():
    scenes = [shapes_text.scene(0, k, "test") for k in range(6)]

    class Drawn(Synthetic):
        def read(self, places):
            return np.stack([shapes_text.render(scenes[place], 32) for place in places])

    names = ("colour", "shape", "size", "position")
    wanted = [
        measures.objects({"objects": {n: [getattr(o, n) for o in s.objects] for n in names}})
        for s in scenes
    ]
    assert measures.objects({"image": b""}) is None
    found = measures.attribute_shares(Drawn(6), wanted)
    assert found["attributes"].value == 1 and found["attribute_count"].value == 1
    found = measures.attribute_shares(Drawn(6), [None, *wanted[:0:-1]])
    assert found["attributes"].value < 0.8


def test_code_use():
    found = measures.code_use(np.array([2, 2, 0, 0]))
    assert found["codes_used"] == 2 and found["code_perplexity"] == pytest.approx(2)
