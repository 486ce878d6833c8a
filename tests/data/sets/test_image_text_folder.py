import csv
import io
import json
import os
import shutil
import tarfile
import unicodedata

import pytest

from vqd_jax.data import sets
from vqd_jax.errors import UserError

NAME = "image_text_folder"


def metadata(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def to_csv(folder):
    rows = metadata(folder)
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(rows)
    (folder / "metadata.jsonl").unlink()


def to_pairs(folder):
    for row in metadata(folder):
        (folder / row["file_name"]).with_suffix(".txt").write_text(row["text"] + "\n")
    (folder / "metadata.jsonl").unlink()


@pytest.mark.parametrize("change", [None, to_csv, to_pairs])
def test_three_ways_to_give_captions(layout, prepared, rows, change):
    source = layout("jsonl")
    expected = {split: metadata(source / split) for split in ("train", "validation")}
    if change:
        for split in expected:
            change(source / split)
    builder = sets.load(NAME, str(source), prepared)
    for split, lines in expected.items():
        found = rows(builder, split)
        assert len(found) == {"train": 12, "validation": 4}[split]
        for row in lines:
            record = found.pop(f"{split}/{row['file_name']}")
            assert record["captions"] == [row["text"]]
            assert record["image"] == (source / record["file"]).read_bytes()
        assert not found


def test_rows_of_one_image_and_lists_of_captions(layout, prepared, rows):
    source = layout("jsonl") / "train"
    lines = [
        {"file_name": "0000.jpg", "text": "one"},
        {"file_name": "0001.jpg", "captions": ["two", "three"]},
        {"file_name": "0000.jpg", "text": 'a "four", with\u2028marks'},
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in lines)
    (source / "metadata.jsonl").write_text(text, encoding="utf-8")
    builder = sets.load(NAME, str(source), prepared)
    found = rows(builder, "train") | rows(builder, "validation")
    assert {file: r["captions"] for file, r in found.items()} == {
        "0000.jpg": ["one", 'a "four", with marks'],
        "0001.jpg": ["two", "three"],
    }


def test_bad_rows_are_named(layout, prepared):
    source = layout("jsonl")
    with open(source / "train/metadata.jsonl", "a") as file:
        file.write('{"file_name": "0000.jpg"}\n{"text": "a"}\n{"file_name": "0001.jpg", "te\n[1]\n')
        file.write('{"file_name": "", "text": "a"}\n{"file_name": "0002.jpg", "text": 5}\n')
    builder = sets.load(NAME, str(source), prepared, max_bad_share=0.5)
    reasons = {bad["file"]: bad["reason"] for bad in sets.bad_records(builder)}
    assert reasons.pop("train/metadata.jsonl#13") == "none of text, caption, captions"
    assert reasons.pop("train/metadata.jsonl#14") == "no 'file_name'"
    assert "Unterminated string" in reasons.pop("train/metadata.jsonl#15")
    reason = reasons.pop("train/metadata.jsonl#16")
    assert reason == "it is no object with fields, but list"
    assert reasons.pop("train/metadata.jsonl#17") == "file_name is empty"
    assert reasons.pop("train/metadata.jsonl#18") == "text is neither a text nor a list of texts"
    assert not reasons


def test_metadata_without_captions_is_an_error(layout, prepared):
    source = layout("jsonl") / "train"
    lines = [json.dumps({"file_name": r["file_name"]}) for r in metadata(source)]
    (source / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="metadata.jsonl has no row with file_name and one of text"):
        sets.load(NAME, str(source), prepared)


def test_a_folder_without_captions_is_named(layout, prepared):
    source = layout("ffhq")
    with pytest.raises(UserError, match=f"{source} holds images but no captions"):
        sets.load(NAME, str(source), prepared)


def test_a_folder_without_images_is_named(tmp_path, prepared):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no images"):
        sets.load(NAME, str(tmp_path / "empty"), prepared)


def test_a_folder_without_training_images_is_named(layout, prepared):
    source = layout("jsonl")
    shutil.rmtree(source / "train")
    with pytest.raises(UserError, match="no images to train on"):
        sets.load(NAME, str(source), prepared)


def test_tars_give_their_samples(layout, prepared, rows):
    source = layout("webdataset")
    builder = sets.load(NAME, str(source), prepared)
    # Of two tars the last is held out.
    for split, tar in (("train", "shard-000000.tar"), ("validation", "shard-000001.tar")):
        found = rows(builder, split)
        with tarfile.open(source / tar) as archive:
            content = {m.name: archive.extractfile(m).read() for m in archive}
        keys = [name[:-4] for name in content if name.endswith(".jpg")]
        assert found.keys() == {f"{tar}/{key}.jpg" for key in keys}
        assert len(found) == 8
        for key in keys:
            record = found[f"{tar}/{key}.jpg"]
            assert record["image"] == content[f"{key}.jpg"]
            assert record["captions"] == [content[f"{key}.txt"].decode()]


def rewrite(path, change):
    """Writes a tar anew with what `change` makes of its members [(name, bytes)]."""
    with tarfile.open(path) as archive:
        members = [(m.name, archive.extractfile(m).read()) for m in archive]
    with tarfile.open(path, "w") as archive:
        for name, data in change(members):
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            else:
                archive.addfile(info)


def test_captions_of_the_json_where_there_is_no_text(layout, prepared, rows):
    source = layout("webdataset")
    first = rows(sets.load(NAME, str(source), prepared), "train")
    path = source / "shard-000000.tar"
    rewrite(path, lambda members: [(n, d) for n, d in members if not n.endswith(".txt")])
    assert rows(sets.load(NAME, str(source), prepared), "train") == first


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def test_what_a_tar_must_not_hold_is_refused(layout, prepared, rows):
    source = layout("webdataset")
    image = dict(tar_members(source / "shard-000000.tar"))["000000000.jpg"]
    extra = [
        ("../outside.jpg", image),
        ("../outside.txt", b"a"),
        ("/absolute.jpg", image),
        link("linked.jpg", "/etc/passwd"),
        link("hard.jpg", "000000000.jpg", tarfile.LNKTYPE),
        ("000000000.jpg", image),
        ("000000000.txt", b"again"),
        ("alone.txt", b"a text"),
        ("silent.jpg", image),
        ("no_words.jpg", image),
        ("no_words.txt", b" \n"),
        ("broken.jpg", image[: len(image) // 2]),
        ("broken.txt", b"half"),
        ("not_json.jpg", image),
        ("not_json.json", b"{"),
        ("list.jpg", image),
        ("list.json", b"[]"),
    ]
    rewrite(source / "shard-000000.tar", lambda members: members + extra)
    builder = sets.load(NAME, str(source), prepared, max_bad_share=0.9)
    reasons = {bad["file"]: bad["reason"] for bad in sets.bad_records(builder)}
    reasons = {file.removeprefix("shard-000000.tar/"): reason for file, reason in reasons.items()}
    for name in ("../outside.jpg", "../outside.txt", "/absolute.jpg", "linked.jpg", "hard.jpg"):
        assert reasons.pop(name) == "a link, a device, over 1 GiB or a name that leads out: refused"
    assert reasons.pop("000000000.jpg") == "an earlier sample of this tar has the same key"
    assert reasons.pop("alone") == "a text without an image"
    assert reasons.pop("silent.jpg") == "no caption"
    assert reasons.pop("no_words.jpg") == "no caption"
    assert "truncated" in reasons.pop("broken.jpg")
    assert reasons.pop("not_json.jpg").startswith("captions: Expecting property name")
    assert reasons.pop("list.jpg").startswith("captions: ")
    assert not reasons
    assert len(rows(builder, "train")) == 8
    assert not (source.parent / "outside.jpg").exists()


def tar_members(path):
    with tarfile.open(path) as archive:
        return [(m.name, archive.extractfile(m).read()) for m in archive]


@pytest.mark.parametrize("cut", [1, 700, 5000])
def test_a_tar_cut_short_is_named_before_anything_is_read(layout, prepared, cut):
    source = layout("webdataset")
    path = source / "shard-000001.tar"
    # Without the padding after the two blocks of zeros that end a tar.
    data = path.read_bytes().rstrip(b"\0")
    end = (len(data) + 511) // 512 * 512 + 1024
    path.write_bytes(path.read_bytes()[: end - cut])
    with pytest.raises(UserError, match=r"shard-000001\.tar is cut short"):
        sets.load(NAME, str(source), prepared)


def test_without_splits_every_20th_image_is_held_out(layout, prepared, rows):
    source = layout("jsonl") / "train"
    to_pairs(source)
    image = source / "0000.jpg"
    for number in range(12, 40):
        shutil.copy(image, source / f"{number:04d}.jpg")
        (source / f"{number:04d}.txt").write_text(str(number))
    builder = sets.load(NAME, str(source), prepared)
    assert sorted(rows(builder, "validation")) == ["0019.jpg", "0039.jpg"]
    assert len(rows(builder, "train")) == 38


def test_other_names_of_splits(layout, prepared):
    source = layout("jsonl")
    (source / "validation").rename(source / "val")
    builder = sets.load(NAME, str(source), prepared)
    assert {k: v.num_examples for k, v in builder.info.splits.items()} == {
        "train": 12,
        "validation": 4,
    }


def test_another_content_is_another_set(layout):
    source = layout("jsonl")
    first = sets.load(NAME, str(source))
    # Prepared beside the images, which does not change what the folder holds.
    assert source in first.data_path.parents
    again = sets.load(NAME, str(source))
    assert again.data_path == first.data_path
    (source / "train/0003.png").unlink()
    second = sets.load(NAME, str(source), max_bad_share=0.1)
    assert second.data_path != first.data_path
    assert sets.source_fingerprint(second) != sets.source_fingerprint(first)
    assert second.info.splits["train"].num_examples == 11
    other = shutil.copytree(source, source.parent / "other", ignore=lambda *_: {NAME})
    third = sets.load(NAME, str(other), max_bad_share=0.1)
    assert sets.source_fingerprint(third) == sets.source_fingerprint(second)


def test_a_link_out_of_the_folder_is_refused(layout, prepared):
    source = layout("jsonl")
    outside = source.parent / "outside.jpg"
    (source / "train/0000.jpg").rename(outside)
    (source / "train/0000.jpg").symlink_to(outside)
    (source / "train/0001.jpg").rename(source / "train/kept.jpg")
    (source / "train/0001.jpg").symlink_to("kept.jpg")
    builder = sets.load(NAME, str(source), prepared, max_bad_share=0.1)
    assert sets.bad_records(builder) == [
        {
            "file": "train/0000.jpg",
            "reason": "a symbolic link leads out of the data directory: refused",
        }
    ]


def test_linked_folders_are_not_entered(layout, prepared):
    source = layout("jsonl")
    to_pairs(source / "train")
    to_pairs(source / "validation")
    (source / "train/round").symlink_to(source)
    os.symlink("/", source / "train/out")
    builder = sets.load(NAME, str(source), prepared)
    assert builder.info.splits["train"].num_examples == 12


def test_what_this_program_wrote_into_the_data_is_left_out(layout, prepared, rows):
    source = layout("jsonl")
    first = sets.load(NAME, str(source), prepared)
    picture = source / "train/0000.jpg"
    for folder, names in {
        "run": ("config.json", ".lock", "samples.png"),
        "a/model": ("config.json", "model-00001-of-00001.safetensors"),
        "many": ("manifest.json", "prompts.txt", "00000000.png"),
        "samples": ("grid_seed0.png", "000_a_seed0_00.png"),
        "emoji_text/1.0.0": ("dataset_info.json", "features.json"),
        "run2/inspect": ("training_stream.png", "statistics.md"),
        "out": ("report.json", "report.html", "protocol.txt"),
        "diffusers": ("model_index.json", "tokenizer/merges.txt"),
    }.items():
        (source / folder).mkdir(parents=True)
        for name in names:
            (source / folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(picture, source / folder / name)
    again = sets.load(NAME, str(source), prepared)
    assert sets.source_fingerprint(again) == sets.source_fingerprint(first)
    assert sets.left_out(again) == {}


def test_every_file_is_a_record_a_part_or_named(layout, prepared, rows):
    source = layout("jsonl")
    to_pairs(source / "train")
    shutil.rmtree(source / "validation")
    folder = source / "train"
    (folder / "0000.jpg").rename(folder / "0000.jfif")
    (folder / "0001.jpg").rename(folder / "0001")
    (folder / "0001.txt").rename(folder / "0001.TXT")
    (folder / "0002.jpg").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "0002.jpg").rename(folder / "0002.heic")
    (folder / "0004.json").write_text("{}")
    (source / "LICENSE").write_text("mine")
    (source / "README.txt").write_text("hello")
    builder = sets.load(NAME, str(source), prepared, max_bad_share=0.1)
    assert [b["file"] for b in sets.bad_records(builder)] == ["train/0002.heic"]
    assert sets.left_out(builder) == {
        "LICENSE": "neither a picture that this program reads nor a text",
        "README.txt": "a text without an image",
    }
    found = rows(builder, "train")
    assert len(found) == 11 and {"train/0000.jfif", "train/0001"} <= set(found)


def test_a_text_is_found_by_another_spelling_of_the_name(layout, prepared, rows):
    source = layout("jsonl") / "train"
    to_pairs(source)
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    (source / "0000.txt").rename(source / f"{composed}.txt")
    (source / "0000.jpg").rename(source / f"{apart}.jpg")
    builder = sets.load(NAME, str(source), prepared)
    assert sets.bad_records(builder) == [] and sets.left_out(builder) == {}
    found = rows(builder, "train") | rows(builder, "validation")
    text = (source / f"{composed}.txt").read_text().strip()
    assert found[f"{apart}.jpg"]["captions"] == [text]


def test_a_name_that_is_not_utf_8_is_a_record(layout, prepared, rows):
    source = layout("jsonl") / "train"
    to_pairs(source)
    for suffix in ("jpg", "txt"):
        os.rename(source / f"0000.{suffix}", os.fsencode(source) + b"/caf\xe9." + suffix.encode())
    # Its name is the last, and the last picture is held out.
    assert list(rows(sets.load(NAME, str(source), prepared), "validation")) == ["caf\\udce9.jpg"]
