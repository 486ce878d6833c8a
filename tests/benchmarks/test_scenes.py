"""A picture is a scene, or none."""

import numpy as np

from vqd_jax.data.sets import shapes_text


def test_drawings_are_scenes_and_mixtures_are_none(benchmark):
    scene_of = benchmark("scenes").scene_of
    drawn = [shapes_text.scene(3, i, "test") for i in range(40)]
    pictures = np.stack([shapes_text.render(scene, 32) for scene in drawn])
    found = [scene_of(picture) for picture in pictures]
    for scene, read in zip(drawn, found, strict=True):
        assert read is not None and read.background == scene.background
        places = [sorted(o.position for o in s.objects) for s in (scene, read)]
        assert places[0] == places[1]
    # Tokens of several pictures, as if each had been drawn by itself.
    rng = np.random.default_rng(0)
    tokens = pictures.reshape(40, 8, 4, 8, 4, 3)
    chosen = rng.integers(0, 40, (20, 8, 8))
    rows, columns = np.mgrid[:8, :8]
    mixed = tokens.transpose(0, 1, 3, 2, 4, 5)[chosen, rows, columns]
    mixed = mixed.transpose(0, 1, 3, 2, 4, 5).reshape(20, 32, 32, 3)
    assert [scene_of(picture) for picture in mixed] == [None] * 20


def test_colours_are_counted_by_how_often_they_come(benchmark):
    effective = benchmark("scenes").effective
    assert effective(["red"] * 7) == 1
    np.testing.assert_allclose(effective(["red", "blue", "blue", "red"]), 2)
    np.testing.assert_allclose(effective(["red"] * 3 + ["blue"]), 0.75**-0.75 * 0.25**-0.25)
