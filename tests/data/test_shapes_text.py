import itertools

import numpy as np
import pytest

from vqd_jax.data import batches
from vqd_jax.data.sets import shapes_text

NAMES = ("colour", "shape", "size", "position")
FIRST = ("white", "blue", "circle", "small", "top right")
FIRST_X = 0.7393981071760082


def scenes(split, count=2000, seed=0):
    return [shapes_text.scene(seed, i, split) for i in range(count)]


def test_scene_is_a_function_of_its_arguments():
    assert shapes_text.scene(5, 17, "train") == shapes_text.scene(5, 17, "train")
    assert shapes_text.scene(5, 17, "train") != shapes_text.scene(5, 18, "train")
    assert shapes_text.scene(5, 17, "train") != shapes_text.scene(6, 17, "train")
    assert shapes_text.scene(5, 17, "train") != shapes_text.scene(5, 17, "validation")
    # Pins the generator: prepared data sets of one version must stay comparable.
    one = shapes_text.scene(0, 0, "train")
    assert (one.background, *(getattr(one.objects[0], n) for n in NAMES)) == FIRST
    assert one.objects[0].x == pytest.approx(FIRST_X, abs=1e-12)


def test_held_out_pairs_are_only_in_the_test_split():
    pairs = {
        s: {(o.colour, o.shape) for scene in scenes(s) for o in scene.objects}
        for s in ("train", "validation")
    }
    held = {
        (c, s)
        for c, s in itertools.product(shapes_text.COLOURS, shapes_text.SHAPES)
        if shapes_text.is_held_out(c, s)
    }
    assert len(held) == 8
    assert not (pairs["train"] | pairs["validation"]) & held
    assert len(pairs["train"]) == 8 * 6 - 8
    test = scenes("test")
    assert {(s.objects[0].colour, s.objects[0].shape) for s in test} == held


def test_every_value_occurs_in_training():
    found = scenes("train")
    objects = [o for s in found for o in s.objects]
    assert {s.background for s in found} == set(shapes_text.BACKGROUNDS)
    assert {o.colour for o in objects} == set(shapes_text.COLOURS)
    assert {o.shape for o in objects} == set(shapes_text.SHAPES)
    assert {o.size for o in objects} == set(shapes_text.SIZES)
    assert {o.position for o in objects} == set(shapes_text.POSITIONS)
    assert 0.70 < np.mean([len(s.objects) == 1 for s in found]) < 0.85


def test_objects_lie_inside_and_apart():
    for scene in scenes("train", 500) + scenes("test", 500):
        covers = [
            shapes_text.coverage(o.shape, 64 * o.x, 64 * o.y, 64 * o.radius, 64)
            for o in scene.objects
        ]
        for cover in covers:
            edges = (cover[0], cover[-1], cover[:, 0], cover[:, -1])
            assert max(edge.max() for edge in edges) < 0.6
        if len(covers) == 2:
            assert not (covers[0] * covers[1]).any()
            assert scene.objects[0].colour != scene.objects[1].colour


@pytest.mark.parametrize("shape", shapes_text.SHAPES)
def test_coverage_has_the_right_area_and_centre(shape):
    radius = 10.0
    star = 5 * 1.1 * 0.45 * np.sin(np.pi / 5)
    areas = {
        "circle": np.pi,
        "square": (2 * 0.88) ** 2,
        "triangle": 1.1**2 * 3 * np.sqrt(3) / 4,
        "diamond": 2 * 1.1 * 0.8,
        "cross": 4 * (2 * 0.34) - (2 * 0.34) ** 2,
        "star": star,
    }
    cover = shapes_text.coverage(shape, 15.3, 17.6, radius, 32)
    assert cover.dtype == np.float32
    assert cover.shape == (32, 32)
    assert cover.sum() == pytest.approx(areas[shape] * radius**2, rel=0.03)
    centres = np.arange(32) + 0.5
    assert cover.sum(0) @ centres / cover.sum() == pytest.approx(15.3, abs=0.15)
    assert cover.sum(1) @ centres / cover.sum() == pytest.approx(17.6, abs=0.15)


def test_render_paints_the_named_colours():
    for scene in scenes("train", 100):
        image = shapes_text.render(scene, 48)
        assert image.dtype == np.uint8
        assert image.shape == (48, 48, 3)
        for o in scene.objects:
            centre = image[int(48 * o.y), int(48 * o.x)]
            assert tuple(centre) == shapes_text.COLOURS[o.colour]
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (np.median(corners, axis=0) == shapes_text.BACKGROUNDS[scene.background]).all()


def test_colours_are_well_separated():
    colours = np.array(list(shapes_text.COLOURS.values()), float)
    backgrounds = np.array(list(shapes_text.BACKGROUNDS.values()), float)
    between = np.linalg.norm(colours[:, None] - colours, axis=-1)
    assert between[~np.eye(8, dtype=bool)].min() > 75
    assert np.linalg.norm(colours[:, None] - backgrounds, axis=-1).min() > 140


def test_first_caption_is_canonical():
    o = shapes_text.Shape("orange", "star", "small", "top left", 0.27, 0.27, 0.14)
    p = shapes_text.Shape("red", "circle", "large", "bottom", 0.5, 0.73, 0.22)
    texts = shapes_text.captions(shapes_text.Scene("pale blue", (o, p)))
    assert texts[0] == (
        "a small orange star at the top left and a large red circle at the bottom, "
        "pale blue background"
    )
    assert texts == shapes_text.captions(shapes_text.Scene("pale blue", (o, p)))


def test_captions_name_every_attribute_in_varied_words():
    synonyms = shapes_text._SYNONYMS
    every = []
    for scene in scenes("train", 400):
        texts = shapes_text.captions(scene)
        assert len(texts) == 4
        for text in texts:
            assert text == text.lower()
            for o in scene.objects:
                for name in NAMES:
                    assert any(w in text for w in synonyms[getattr(o, name)]), (text, name)
        every += texts
    for words in synonyms.values():
        for word in words:
            assert any(word in text for text in every), word
    assert not any(" a orange" in t or t.startswith("a orange") for t in every)


def test_prepared_records_equal_the_functions(shapes):
    assert {k: v.num_examples for k, v in shapes.info.splits.items()} == {
        "train": 60,
        "validation": 10,
        "test": 20,
    }
    for split in ("train", "test"):
        source = batches.records(shapes, split)
        seen = set()
        for i in range(len(source)):
            record = source[i]
            index = int(record["file"].removeprefix(f"{split}/"))
            seen.add(index)
            scene = shapes_text.scene(3, index, split)
            np.testing.assert_array_equal(record["image"], shapes_text.render(scene, 32))
            assert record["captions"] == shapes_text.captions(scene)
            assert record["background"] == scene.background
            for name in NAMES:
                assert record["objects"][name] == [getattr(o, name) for o in scene.objects]
        assert seen == set(range(len(source)))


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="'dev'; it is one of train, validation, test"):
        shapes_text.scene(0, 0, "dev")
