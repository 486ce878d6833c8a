import json
import shutil
import struct
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from vqd_jax.data import sets
from vqd_jax.errors import UserError

COUNTS = {"train": 24, "validation": 8}


def annotations(source, phase):
    return json.loads((source / f"annotations/captions_{phase}2014.json").read_text())


def zip_folder(source, folder, name):
    with zipfile.ZipFile(source / name, "w") as archive:
        for path in sorted((source / folder).iterdir()):
            archive.write(path, f"{folder}/{path.name}")
    shutil.rmtree(source / folder)


def zip_all(source):
    zip_folder(source, "annotations", "annotations_trainval2014.zip")
    zip_folder(source, "train2014", "train2014.zip")
    zip_folder(source, "val2014", "val2014.zip")


def test_records_equal_the_annotations(layout, prepared, rows):
    source = layout("coco")
    builder = sets.load("coco_text", str(source), prepared)
    for split, phase in (("train", "train"), ("validation", "val")):
        content = annotations(source, phase)
        found = rows(builder, split)
        assert len(found) == COUNTS[split] == len(content["images"])
        for image in content["images"]:
            record = found.pop(f"{phase}2014/{image['file_name']}")
            notes = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            texts = [a["caption"].strip() for a in sorted(notes, key=lambda a: a["id"])]
            assert record["captions"] == texts
            assert len(texts) in (5, 6)
            assert record["image"] == (source / record["file"]).read_bytes()
        assert not found
    assert sets.bad_records(builder) == []
    assert sets.evaluation_split(builder) == "validation"


def test_zips_give_the_same_records(layout, prepared, tmp_path, all_rows):
    source = layout("coco")
    plain = all_rows(sets.load("coco_text", str(source), prepared))
    zip_all(source)
    builder = sets.load("coco_text", str(source), str(tmp_path / "from_zips"))
    assert all_rows(builder) == plain


def test_the_published_extra_level_is_found(layout, prepared):
    source = layout("coco")
    for phase in ("train2014", "val2014"):
        (source / phase).rename(source / "moved")
        (source / phase).mkdir()
        (source / "moved").rename(source / phase / phase)
    builder = sets.load("coco_text", str(source), prepared)
    assert {k: v.num_examples for k, v in builder.info.splits.items()} == COUNTS


def test_a_zip_cut_short_is_named(layout, prepared):
    source = layout("coco")
    zip_all(source)
    data = (source / "train2014.zip").read_bytes()
    (source / "train2014.zip").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"train2014\.zip is cut short .* download it again"):
        sets.load("coco_text", str(source), prepared)


def test_damage_inside_a_zip_is_a_bad_record(layout, prepared):
    source = layout("coco")
    zip_all(source)
    with zipfile.ZipFile(source / "train2014.zip") as archive:
        member = archive.infolist()[3]
    with open(source / "train2014.zip", "r+b") as file:
        file.seek(member.header_offset + 200)
        file.write(b"\0" * 20)
    builder = sets.load("coco_text", str(source), prepared, max_bad_share=0.1)
    [bad] = sets.bad_records(builder)
    assert bad["file"] == member.filename
    assert "damaged in the zip: Bad CRC-32" in bad["reason"]


def test_every_kind_of_bad_annotation_is_named(layout, prepared, rows):
    source, broken = layout("coco"), layout("bad")
    target = source / "annotations/captions_val2014.json"
    shutil.copy(broken / "annotations/captions_missing.json", target)
    shutil.copy(broken / "images/good.jpg", source / "val2014")
    builder = sets.load("coco_text", str(source), prepared, max_bad_share=0.5)
    [record] = rows(builder, "validation").values()
    assert (record["file"], record["captions"]) == ("val2014/good.jpg", ["A fox face."])
    name = "annotations/captions_val2014.json"
    assert sets.bad_records(builder) == [
        {"file": f"{name}#3", "reason": "image id 99 is not in the list of images"},
        {"file": f"{name}#4", "reason": "empty caption"},
        {"file": "val2014/missing.jpg", "reason": "the file is missing"},
    ]


@pytest.mark.parametrize("damage", [lambda d: d[:500], lambda d: b"[1]", lambda d: b"{}"])
def test_a_damaged_annotation_file_is_named(layout, prepared, damage):
    source = layout("coco")
    path = source / "annotations/captions_train2014.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"captions_train2014\.json is not a COCO caption file"):
        sets.load("coco_text", str(source), prepared)


def test_a_fault_of_one_row_is_one_bad_record(layout, prepared, rows):
    source = layout("coco")
    path = source / "annotations/captions_train2014.json"
    content = annotations(source, "train")
    whole = rows(sets.load("coco_text", str(source), str(prepared) + "_whole"), "train")
    first, second, *_ = content["annotations"]
    [images, notes] = content["images"], content["annotations"]
    notes += [
        {"id": 1, "image_id": images[0]["id"], "caption": None},
        {"id": 2, "image_id": images[0]["id"]},
        {"id": "x", "image_id": images[0]["id"], "caption": "a"},
        {"id": 3, "image_id": [], "caption": "a"},
        {"id": 4, "image_id": images[0]["id"], "caption": "half \ud83c"},
        None,
    ]
    images += [{"id": 5}, {"file_name": "a.jpg"}, "b.jpg", images[0]]
    path.write_text(json.dumps(content))
    builder = sets.load("coco_text", str(source), prepared, max_bad_share=0.9)
    reasons = {b["file"].split("#")[1]: b["reason"] for b in sets.bad_records(builder)}
    assert reasons == {
        "1": "caption is null, not a text",
        "2": "no 'caption'",
        f"annotations[{len(notes) - 4}]": "id is 'x', not a whole number",
        "3": "image_id is [], not a whole number",
        f"annotations[{len(notes) - 1}]": "no 'id'",
        f"images[{len(images) - 4}]": "no 'file_name'",
        f"images[{len(images) - 3}]": "no 'id'",
        f"images[{len(images) - 2}]": "no 'id'",
        f"images[{len(images) - 1}]": "an earlier one has the same id",
    }
    found = rows(builder, "train")
    name = f"train2014/{images[0]['file_name']}"
    assert found.pop(name)["captions"] == ["half", *whole.pop(name)["captions"]]
    assert found == whole


@pytest.mark.parametrize("spelled", ["{}", "./{}", ".\\{}"])
def test_a_picture_with_two_ids_is_one_record(layout, prepared, rows, spelled):
    source = layout("coco")
    whole = rows(sets.load("coco_text", str(source), str(prepared) + "_whole"), "train")
    path = source / "annotations/captions_train2014.json"
    content = annotations(source, "train")
    name = content["images"][0]["file_name"]
    content["images"].append({"id": 7, "file_name": spelled.format(name)})
    content["annotations"].append({"id": 10**9, "image_id": 7, "caption": "one more"})
    path.write_text(json.dumps(content))
    builder = sets.load("coco_text", str(source), prepared)
    found = rows(builder, "train")
    assert found[f"train2014/{name}"]["captions"].pop() == "one more"
    assert found == whole and sets.bad_records(builder) == []


def test_a_name_that_leads_out_is_refused(layout, prepared):
    source = layout("coco")
    # It could be read.
    shutil.copy(next((source / "train2014").iterdir()), source.parent / "secret.jpg")
    path = source / "annotations/captions_train2014.json"
    content = annotations(source, "train")
    content["images"][0]["file_name"] = "../../secret.jpg"
    path.write_text(json.dumps(content))
    builder = sets.load("coco_text", str(source), prepared, max_bad_share=0.1)
    [bad] = sets.bad_records(builder)
    assert bad["reason"] == "the name leads out of the data directory: refused"


class CocoCaptions(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The features and splits of TFDS's own set, of the tiny tree."""

    name = "coco_captions"
    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2014")]

    def __init__(self, source, **kwargs):
        self._source = source
        super().__init__(**kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "image/filename": tfds.features.Text(),
                    "image/id": tfds.features.Scalar(np.int64),
                    "captions": tfds.features.Sequence({"text": np.str_, "id": np.int64}),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        val = range(8)
        parts = {"val": val[:3], "test": val[3:5], "restval": val[5:]}
        splits = {name: self._generate_examples("val", part) for name, part in parts.items()}
        return {"train": self._generate_examples("train", range(24))} | splits

    def _generate_examples(self, phase, part):
        content = annotations(self._source, phase)
        for image in [content["images"][i] for i in part]:
            notes = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            file = image["file_name"]
            yield (
                file,
                {
                    "image": self._source / f"{phase}2014" / file,
                    "image/filename": file,
                    "image/id": image["id"],
                    "captions": [{"text": a["caption"], "id": a["id"]} for a in notes],
                },
            )


def to_tf_records(folder):
    """Rewrites array_record files as TFRecord, the default of TFDS; checksums left empty."""
    for path in folder.glob("*.array_record*"):
        reader = array_record_module.ArrayRecordReader(str(path))
        with open(str(path).replace("array_record", "tfrecord"), "wb") as file:
            for data in reader.read_all():
                file.write(struct.pack("<QI", len(data), 0) + data + bytes(4))
        reader.close()
        path.unlink()


@pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_prepared_coco_captions_gives_the_same_records(
    layout, prepared, tmp_path, all_rows, kind, inside
):
    source = layout("coco")
    plain = all_rows(sets.load("coco_text", str(source), prepared))
    official = CocoCaptions(source, data_dir=str(tmp_path / "official"))
    official.download_and_prepare(file_format="array_record")
    if kind == "tfrecord":
        to_tf_records(official.data_path)
    data_dir = official.data_path if inside else tmp_path / "official"
    builder = sets.load("coco_text", str(data_dir), str(tmp_path / "again"))
    assert all_rows(builder) == plain


def test_a_tfrecord_cut_short_is_named(layout, prepared, tmp_path):
    official = CocoCaptions(layout("coco"), data_dir=str(tmp_path / "official"))
    official.download_and_prepare(file_format="array_record")
    to_tf_records(official.data_path)
    [shard] = official.data_path.glob("*-train.tfrecord*")
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match="train.tfrecord-00000-of-00001 is cut short"):
        sets.load("coco_text", str(tmp_path / "official"), prepared)


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_a_shard_that_is_a_link_out_is_refused(prepared, tmp_path, kind):
    (tmp_path / "outside").write_bytes(b"")
    (tmp_path / "linked").mkdir()
    for split in ("train", "val"):
        shard = tmp_path / f"linked/coco_captions-{split}.{kind}-00000-of-00001"
        shard.symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="00000-of-00001: a symbolic link leads out"):
        sets.load("coco_text", str(tmp_path / "linked"), prepared)
