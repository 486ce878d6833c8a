import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from vqd_jax.data.sets import shapes_text
from vqd_jax.evaluation import attributes


def noise(image, rng):
    return image + rng.normal(0, 20, image.shape)


def blur(image, rng):
    width = 0.8 * len(image) / 32
    return ndimage.gaussian_filter(image, (width, width, 0))


# What must be read back, and the least share of pictures that read back as they were drawn.
CASES = {
    "clean": (lambda image, rng: image, 0.995),
    "noise": (noise, 0.98),
    "blur": (blur, 0.98),
    "both": (lambda image, rng: noise(blur(image, rng), rng), 0.96),
}


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("case", CASES)
def test_attributes_are_read_back(case, size):
    damage, least = CASES[case]
    rng = np.random.default_rng(0)
    scores, backgrounds = [], []
    for index in range(200):
        scene = shapes_text.scene(7, index, "test" if index % 2 else "train")
        image = damage(shapes_text.render(scene, size).astype(float), rng)
        image = np.clip(np.rint(image), 0, 255).astype(np.uint8)
        wanted = [dataclasses.asdict(o) for o in scene.objects]
        scores.append(list(attributes.attribute_scores(image, wanted).values()))
        backgrounds.append(attributes.read_background(image) == scene.background)
    assert np.mean(scores, axis=0).min() >= least
    assert np.mean(backgrounds) >= least


def test_read_attributes_returns_names_in_reading_order():
    low = shapes_text.Shape("red", "cross", "large", "bottom right", 0.73, 0.73, 0.22)
    high = shapes_text.Shape("black", "circle", "small", "top left", 0.27, 0.27, 0.14)
    image = shapes_text.render(shapes_text.Scene("pale green", (low, high)), 32)
    assert attributes.read_attributes(image) == [
        {"colour": "black", "shape": "circle", "size": "small", "position": "top left"},
        {"colour": "red", "shape": "cross", "size": "large", "position": "bottom right"},
    ]


def test_empty_and_noisy_pictures():
    assert attributes.read_attributes(np.full((32, 32, 3), 200, np.uint8)) == []
    noisy = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    wanted = [{"colour": "red", "shape": "star", "size": "small", "position": "top"}]
    assert attributes.attribute_scores(noisy, wanted).keys() == {*attributes.ATTRIBUTES, "count"}


def test_scores_count_what_is_wrong():
    drawn = shapes_text.Shape("blue", "square", "large", "left", 0.27, 0.5, 0.22)
    image = shapes_text.render(shapes_text.Scene("white", (drawn,)), 32)
    right = {"colour": "blue", "shape": "square", "size": "large", "position": "left"}
    ones = dict.fromkeys((*attributes.ATTRIBUTES, "count"), 1.0)
    assert attributes.attribute_scores(image, [right]) == ones
    other = attributes.attribute_scores(image, [right | {"colour": "red", "position": "top"}])
    assert other == ones | {"colour": 0.0, "position": 0.0}
    missing = attributes.attribute_scores(image, [right | {"colour": "red"}, right])
    assert missing == {n: 0.5 for n in attributes.ATTRIBUTES} | {"count": 0.0}


def test_wrong_array_is_an_error():
    with pytest.raises(ValueError, match=r"float64 \(32, 32, 3\); it must be uint8"):
        attributes.read_attributes(np.zeros((32, 32, 3)))
