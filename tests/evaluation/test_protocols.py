"""Each protocol, applied to a tiny tree in the layout of its data set."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from vqd_jax.data import batches, sets
from vqd_jax.errors import UserError
from vqd_jax.evaluation import protocols

LAYOUTS = Path(__file__).parents[1] / "data" / "layouts"


def planned(builder, protocol, **options):
    split = protocols.split_of(protocol.prompts, builder)
    records = batches.records(builder, split, decode=False)
    return protocols.plan(protocol, builder, records, **{"condition": "text"} | options), records


def load(name, layout, tmp_path):
    shutil.copytree(LAYOUTS / layout, tmp_path / layout)
    return sets.load(name, str(tmp_path / layout))


def test_coco_is_captions_of_val2014_against_their_pictures(tmp_path):
    builder = load("coco_text", "coco", tmp_path)
    found, records = planned(builder, protocols.find("", "coco_text"))
    assert found.prompt_split == found.reference_split == "validation"
    assert found.num_generated == 30_000 and len(found.prompts) == len(records)
    for text, place in zip(found.prompts, found.records, strict=True):
        assert text in records[int(place)]["captions"]
    np.testing.assert_array_equal(np.sort(found.records), found.reference)
    assert (found.weights == 1).all()


def test_cub_repeats_the_test_pictures(tmp_path):
    builder = load("cub_text", "cub", tmp_path)
    found, records = planned(builder, protocols.find("cub", "cub_text"))
    assert found.prompt_split == "test" and found.num_generated == found.weights.sum() == 30_000
    assert np.ptp(found.weights) <= 1
    assert len(found.prompts) == sum(len(record["captions"]) for record in records)
    again, _ = planned(builder, protocols.CUB)
    assert again.prompts == found.prompts


def test_imagenet_is_every_class_against_the_training_pictures(environment, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", environment["TFDS_DATA_DIR"])
    builder = sets.load("emoji_text")
    found, records = planned(
        builder, protocols.IMAGENET, condition="class", num_classes=1000, num_generated=100
    )
    assert found.prompts == [str(label) for label in range(1000)]
    assert found.name == "imagenet, 100 of 50,000 pictures"
    np.testing.assert_array_equal(found.reference, np.arange(len(records)))
    assert (found.records == -1).all()
    emoji, _ = planned(builder, protocols.find("", "emoji_text"))
    assert (len(emoji.prompts), emoji.num_generated, len(emoji.reference)) == (3155, 10_000, 3155)
    held_out, _ = planned(builder, protocols.HELD_OUT)
    assert held_out.name == "held_out" and held_out.num_generated == 176
    none, _ = planned(builder, protocols.EMOJI, condition="none")
    assert none.prompts == [""]


def test_a_protocol_of_another_set_is_refused():
    with pytest.raises(UserError, match="is not one of the data set emoji_text"):
        protocols.find("coco", "emoji_text")
    with pytest.raises(UserError, match="must be one of coco, cub"):
        protocols.find("fid", "emoji_text")
    assert protocols.find("", "oxford102_text") is protocols.HELD_OUT
    assert protocols.find("", "shapes_text/64px") is protocols.SHAPES
