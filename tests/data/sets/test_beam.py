"""Apache Beam prepares the same sets, record for record; the in-process runner."""

import pytest

from vqd_jax.data import sets
from vqd_jax.errors import UserError

pytest.importorskip("apache_beam")
RUNNER = "--runner=DirectRunner"


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("coco_text", "coco"),
        ("cub_text/published", "cub"),
        ("oxford102_text", "oxford102"),
        ("imagenet_class", "imagenet"),
        ("ffhq_images", "ffhq"),
        ("image_text_folder", "jsonl"),
        ("image_text_folder", "webdataset"),
    ],
)
def test_beam_gives_the_same_set(layout, prepared, tmp_path, rows, name, folder):
    source = str(layout(folder))
    plain = sets.load(name, source, prepared)
    beam = sets.load(name, source, str(tmp_path / "beam"), beam=RUNNER)
    assert beam.info.splits.keys() == plain.info.splits.keys()
    for split in plain.info.splits:
        # In the same order, too.
        assert list(rows(beam, split).items()) == list(rows(plain, split).items())
    assert sets.source_fingerprint(beam) == sets.source_fingerprint(plain)


@pytest.fixture
def bad(layout):
    """The broken and unusual files, as the training split of a folder."""
    source = layout("bad")
    source.rename(source.parent / "train")
    return str(source.parent)


def test_bad_records_are_gathered(bad, prepared, tmp_path):
    plain = sets.load("image_text_folder", bad, prepared, 0.4)
    beam = sets.load("image_text_folder", bad, str(tmp_path / "beam"), 0.4, RUNNER)
    assert sets.bad_records(beam) == sets.bad_records(plain)
    assert {p.name for p in beam.data_path.iterdir()} == {p.name for p in plain.data_path.iterdir()}


def test_too_many_bad_records_stop(bad, prepared):
    with pytest.raises(UserError, match="4 of 10 records are bad"):
        sets.load("image_text_folder", bad, prepared, 0.2, RUNNER)


def test_a_split_without_any_good_record_stops(layout, prepared):
    source = layout("jsonl")
    for path in (source / "validation").glob("*g"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="Apache Beam could not prepare image_text_folder: .*valid"):
        sets.load("image_text_folder", str(source), prepared, 1.0, RUNNER)
    assert not list((source.parent.parent / "prepared").rglob("incomplete.*"))


def test_what_workers_refuse_is_reported(prepared, tmp_path):
    (tmp_path / "cut").mkdir()
    shard = tmp_path / "cut/coco_captions-train.tfrecord-00000-of-00001"
    shard.write_bytes(b"12345")
    (tmp_path / "cut/coco_captions-val.tfrecord-00000-of-00001").write_bytes(b"12345")
    with pytest.raises(UserError, match="tfrecord-00000-of-00001 is cut short"):
        sets.load("coco_text", str(tmp_path / "cut"), prepared, beam=RUNNER)
