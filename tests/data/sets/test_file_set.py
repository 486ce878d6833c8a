"""What all sets made from files share: information, bad data, source, interruption."""

import errno
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from vqd_jax.data import images, sets
from vqd_jax.data.sets import prepare
from vqd_jax.data.sets.image_text_folder import ImageTextFolder
from vqd_jax.errors import UserError
from vqd_jax.options import DATA_SETS

ROOT = pathlib.Path(__file__).parents[3]
SETS = {
    "coco_text": ("coco", "cocodataset.org", "Creative Commons Attribution 4.0"),
    "cub_text": ("cub", "vision.caltech.edu", "non-commercial research"),
    "cub_text/published": ("cub", "vision.caltech.edu", "non-commercial research"),
    "oxford102_text": ("oxford102", "robots.ox.ac.uk", "no licence is stated"),
    "imagenet_class": ("imagenet", "image-net.org", "non-commercial research"),
    "ffhq_images": ("ffhq", "NVlabs/ffhq-dataset", "BY-NC-SA 4.0"),
    "image_text_folder": ("jsonl", "", "user's own"),
}
BAD_REASONS = {
    "train/images/missing.jpg": "the file is missing",
    "train/images/not_an_image.jpg": "not an image of a known format",
    "train/images/truncated.jpg": "image file is truncated (37 bytes not processed)",
    "train/images/zero_byte.jpg": "the file is empty",
}


@pytest.fixture
def bad(layout):
    """The broken and unusual files, as the training split of a folder."""
    source = layout("bad")
    source.rename(source.parent / "train")
    return source.parent


def test_every_set_is_listed():
    assert set(SETS) < set(DATA_SETS)


@pytest.mark.parametrize("name", SETS)
def test_sets_say_where_they_come_from(layout, prepared, name):
    folder, homepage, licence = SETS[name]
    info = sets.load(name, str(layout(folder)), prepared).info
    assert homepage in info.homepage
    assert licence in info.redistribution_info.license
    assert name == "image_text_folder" or "year = {" in info.citation
    assert {"image", "captions", "file"} <= set(info.features)
    assert ("label" in info.features) == (folder in ("cub", "oxford102", "imagenet"))


@pytest.mark.parametrize("name", SETS)
def test_a_missing_directory_is_named(tmp_path, name):
    with pytest.raises(UserError, match="there is no directory .*nowhere; config.data.dir"):
        sets.load(name, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="config.data.dir must name their directory"):
        sets.load(name)


@pytest.mark.parametrize(
    ("name", "folder", "looked_for", "found"),
    [
        ("coco_text", "cub", "captions_train2014.json", "classes.txt"),
        ("cub_text", "coco", "CUB_200_2011/images", "annotations/"),
        ("cub_text/published", "imagenet", "images", "LOC_synset_mapping.txt"),
        ("oxford102_text", "ffhq", "jpg", "images256x256/"),
        ("imagenet_class", "coco", "train", "train2014/"),
        ("ffhq_images", "oxford102", "images256x256", "setid.mat"),
    ],
)
def test_the_directory_of_another_set_is_named(layout, prepared, name, folder, looked_for, found):
    source = layout(folder)
    with pytest.raises(UserError) as error:
        sets.load(name, str(source), prepared)
    message = str(error.value)
    assert str(source) in message
    before, _, after = message.partition("; found")
    assert looked_for in before.partition("looked for")[2]
    assert found in after
    assert not os.path.exists(prepared)


def test_every_bad_image_is_counted_and_named(bad, prepared, rows):
    builder = sets.load("image_text_folder", str(bad), prepared, max_bad_share=0.4)
    assert {b["file"]: b["reason"] for b in sets.bad_records(builder)} == BAD_REASONS
    found = rows(builder, "train")
    lines = (bad / "train/metadata.jsonl").read_text().splitlines()
    files = {"train/" + json.loads(line)["file_name"] for line in lines}
    assert found.keys() == files - BAD_REASONS.keys()
    for file, record in found.items():
        assert record["image"] == (bad / file).read_bytes()
        assert images.decode(record["image"]).shape == (80, 96, 3)


def test_every_bad_caption_file(bad, prepared, rows, caplog):
    folder = bad / "train/images"
    (bad / "train/metadata.jsonl").unlink()
    for path in (bad / "train/captions").iterdir():
        picture = (folder / path.name).with_suffix(".jpg")
        if not picture.exists() and not picture.with_suffix(".png").exists():
            shutil.copy(folder / "good.jpg", picture)
        path.rename(folder / path.name)
    builder = sets.load("image_text_folder", str(bad), prepared, max_bad_share=0.4)
    reasons = {b["file"]: b["reason"] for b in sets.bad_records(builder)}
    expected = {file: r for file, r in BAD_REASONS.items() if "missing" not in file}
    assert reasons == expected | {"train/images/empty_file.jpg": "no caption"}
    found = rows(builder, "train")
    assert len(found["train/images/empty_line.jpg"]["captions"]) == 3
    stored = (folder / "non_utf8.txt").read_bytes().decode("cp1252")
    assert found["train/images/non_utf8.jpg"]["captions"] == [stored.strip()]
    assert any(ord(c) > 127 for c in stored)
    assert "non_utf8.txt is not UTF-8; it is read as Windows' code page 1252" in caplog.text


def test_a_caption_file_that_is_missing_is_named(layout, prepared):
    source = layout("cub")
    (source / "text_c10/001.Rooster/Rooster_0001_796111.txt").unlink()
    builder = sets.load("cub_text", str(source), prepared, max_bad_share=0.1)
    [bad] = sets.bad_records(builder)
    assert bad["file"] == "images/001.Rooster/Rooster_0001_796111.jpg"
    assert bad["reason"].endswith("Rooster_0001_796111.txt: the file is missing")


class Forgetful(ImageTextFolder, skip_registration=True):
    """A builder with a fault of ours: it loses the first picture of every split."""

    name = "image_text_folder"

    def _generate_examples(self, split, items):
        return super()._generate_examples(split, items[1:])


def test_a_set_in_which_something_was_lost_is_not_made(layout, prepared):
    told = "12 items of the split train gave 11 records and bad records: a fault of this program"
    with pytest.raises(OSError, match=told):
        prepare.from_files(Forgetful, "", str(layout("jsonl")), prepared, 0.5, "")
    assert not list(pathlib.Path(prepared).rglob("dataset_info.json"))


def test_too_many_bad_records_stop_with_the_counts(bad, prepared):
    with pytest.raises(UserError, match="3 of 10 records are bad, more than") as error:
        sets.load("image_text_folder", str(bad), prepared, max_bad_share=0.2)
    message = str(error.value)
    assert "raise config.data.max_bad_share" in message
    [listing] = pathlib.Path(prepared).glob("image_text_folder/*/*.bad_records.jsonl")
    assert str(listing) in message
    # It stopped at the record with which the share was exceeded.
    lines = [json.loads(line) for line in listing.read_text().splitlines()]
    assert sum("left_out" not in line for line in lines) == 3
    left = {p.name for p in listing.parent.iterdir()}
    assert left == {".1.0.0.lock", "1.0.0.bad_records.jsonl"}
    # The share is allowed now, and the list beside the set is the whole one.
    builder = sets.load("image_text_folder", str(bad), prepared, max_bad_share=0.4)
    assert len(sets.bad_records(builder)) == 4
    assert not listing.exists()
    # And it is forbidden again, for the prepared set.
    with pytest.raises(UserError, match="4 of 10 records are bad"):
        sets.load("image_text_folder", str(bad), prepared, max_bad_share=0.2)


def test_a_split_without_any_good_record_stops(layout, prepared):
    source = layout("jsonl")
    for path in (source / "validation").glob("*g"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no record of the split 'validation' can be used.*names"):
        sets.load("image_text_folder", str(source), prepared, max_bad_share=1.0)


def change_annotations(source):
    path = source / "annotations/captions_val2014.json"
    path.write_text(path.read_text().replace("emoji", "image", 1))
    return "annotations/captions_val2014.json"


def remove_image(source):
    next((source / "train2014").iterdir()).unlink()
    return "train2014"


def rename_image(source):
    path = next((source / "val2014").iterdir())
    path.rename(path.with_name("other.jpg"))
    return "val2014"


@pytest.mark.parametrize("change", [change_annotations, remove_image, rename_image])
def test_a_changed_source_is_noticed_and_named(layout, prepared, change):
    source = layout("coco")
    first = sets.load("coco_text", str(source), prepared)
    fingerprint = sets.source_fingerprint(first)
    name = change(source)
    with pytest.raises(UserError, match=f"changed since it was prepared: {name}: ") as error:
        sets.load("coco_text", str(source), prepared, max_bad_share=0.5)
    assert f"remove {first.data_path} to prepare it anew" in str(error.value)
    shutil.rmtree(first.data_path)
    second = sets.load("coco_text", str(source), prepared, max_bad_share=0.5)
    assert sets.source_fingerprint(second) != fingerprint


def test_a_changed_caption_file_is_noticed(layout, prepared):
    source = layout("cub")
    sets.load("cub_text", str(source), prepared)
    path = next((source / "text_c10/001.Rooster").iterdir())
    path.write_text(path.read_text() + "one more\n")
    with pytest.raises(UserError, match="changed since it was prepared: text_c10: "):
        sets.load("cub_text", str(source), prepared)


def test_copies_and_new_dates_are_no_change(layout, prepared, tmp_path):
    source = layout("coco")
    first = sets.load("coco_text", str(source), prepared)
    copy = shutil.copytree(source, tmp_path / "copy")
    for path in copy.rglob("*"):
        os.utime(path, (1, 1))
    second = sets.load("coco_text", str(copy), prepared)
    assert sets.source_fingerprint(second) == sets.source_fingerprint(first)


def test_a_prepared_set_without_its_source_is_used(layout, tmp_path, all_rows, caplog):
    source = layout("coco")
    first = all_rows(sets.load("coco_text", str(source)))
    copy = tmp_path / "copy"
    shutil.copytree(source / "coco_text", copy / "coco_text")
    assert all_rows(sets.load("coco_text", str(copy))) == first
    assert "not compared with its files" in caplog.text


def test_a_set_that_an_earlier_version_prepared_is_used(layout, tmp_path, all_rows):
    source, prepared = layout("coco"), tmp_path / "prepared"
    shutil.unpack_archive(pathlib.Path(__file__).parent / "coco_text_3c677fe.zip", prepared)
    stored = {p: p.read_bytes() for p in prepared.rglob("*") if p.is_file()}
    builder = sets.load("coco_text", str(source), str(prepared))
    # Caches of codes name the fingerprint.
    assert sets.source_fingerprint(builder) == "coco_text/1.0.0@1808ec008385ca45"
    assert all(path.read_bytes() == data for path, data in stored.items())
    anew = sets.load("coco_text", str(source), str(tmp_path / "anew"))
    assert all_rows(anew) == all_rows(builder)
    assert sets.source_fingerprint(anew) == sets.source_fingerprint(builder)


def test_data_may_move_be_copied_and_be_linked(layout, prepared, monkeypatch):
    source = layout("jsonl")
    first = sets.load("image_text_folder", str(source), prepared)
    monkeypatch.setattr(prepare, "_prepare", lambda *_: pytest.fail("prepared again"))
    copy = shutil.copytree(source, source.parent / "a copy")
    (source.parent / "link").symlink_to(source)
    moved = source.rename(source.parent / "moved")
    (source.parent / "link").unlink()
    (source.parent / "link").symlink_to(moved)
    for place in (copy, moved, source.parent / "link"):
        again = sets.load("image_text_folder", str(place), prepared)
        assert again.data_path == first.data_path
        assert sets.source_fingerprint(again) == sets.source_fingerprint(first)


@pytest.mark.parametrize("failures", [2, 3])
def test_an_error_of_the_system_is_no_bad_record(layout, prepared, monkeypatch, failures):
    source = layout("ffhq")
    name = next(source.rglob("*.png"))
    calls, read_bytes = [], pathlib.Path.read_bytes

    def read(path):
        if path == name:
            calls.append(path)
            if len(calls) <= failures:
                raise OSError(errno.EIO, "Input/output error")
        return read_bytes(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", read)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    if failures == 3:
        with pytest.raises(OSError, match=f"error, three times; run again .*{name}"):
            sets.load("ffhq_images", str(source), prepared)
    else:
        builder = sets.load("ffhq_images", str(source), prepared)
        assert sets.bad_records(builder) == []
        assert sum(s.num_examples for s in builder.info.splits.values()) == 2


def test_what_is_no_prepared_set_is_named(layout, prepared):
    source = layout("coco")
    builder = sets.load("coco_text", str(source), prepared)
    for name, error in (("source.json", OSError), ("dataset_info.json", FileNotFoundError)):
        (builder.data_path / name).unlink()
        with pytest.raises(error, match=str(builder.data_path)):
            sets.load("coco_text", str(source), prepared)


def test_a_directory_that_cannot_be_written_is_left_alone(layout, tmp_path, monkeypatch):
    source = layout("coco")
    before = sorted(source.rglob("*"))
    # Root may write everywhere, so a mode of 0o555 would prove nothing.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "default"))
    builder = sets.load("coco_text", str(source))
    assert builder.data_path == tmp_path / "default/coco_text/1.0.0"
    assert sorted(source.rglob("*")) == before


def test_a_full_disk_is_named(layout, prepared, monkeypatch):
    def full(builder, beam):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare, "_prepare", full)
    with pytest.raises(OSError, match="cannot prepare coco_text: No space left .* make room"):
        sets.load("coco_text", str(layout("coco")), prepared)


PREPARE = """
import sys
import tensorflow_datasets as tfds
from vqd_jax.data import sets
builder = sets.load('image_text_folder', sys.argv[1], sys.argv[2])
decoders = {'image': tfds.decode.SkipDecoding()}
for split in builder.info.splits:
    for record in builder.as_data_source(split, decoders=decoders):
        print(record['file'].decode())
"""


@pytest.mark.slow
def test_kills_at_random_moments_lose_and_double_nothing(layout, prepared):
    source = layout("jsonl") / "train"
    names = {f"{n:05d}.jpg" for n in range(3000)}
    (source / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": n, "text": n}) + "\n" for n in sorted(names))
    )
    for name in names:
        shutil.copy(source / "0000.jpg", source / name)
    command = [sys.executable, "-c", PREPARE, str(source), prepared]
    rng = random.Random(0)
    killed = 0
    for _ in range(10):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        # The imports take a while, so the time counts from the first file of the preparation.
        while process.poll() is None and not list(pathlib.Path(prepared).rglob("incomplete.*")):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        for path in pathlib.Path(prepared).glob("*/*/1.0.0"):
            shutil.rmtree(path)
    assert killed == 10
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert sorted(output.split()) == sorted(names)
    assert not list(pathlib.Path(prepared).rglob("incomplete.*"))
