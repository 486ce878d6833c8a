import io
import tarfile

import pytest
from PIL import Image

from vqd_jax.data import sets
from vqd_jax.data.sets import splits
from vqd_jax.errors import UserError

NAME = "image_text_folder"


def picture(number):
    data = io.BytesIO()
    Image.new("RGB", (9, 9), (number % 256, number // 256, 0)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def pairs(tmp_path):
    """pairs("a/0", ...) -> a folder with these pictures, each with a text."""

    def pairs(*names):
        root = tmp_path / "pairs"
        for number, name in enumerate(names):
            path = root / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(number))
            path.with_suffix(".txt").write_text(name)
        return root

    return pairs


def sizes(source, prepared):
    builder = sets.load(NAME, str(source), prepared)
    return {split: info.num_examples for split, info in builder.info.splits.items()}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train/a.png", "train"),
        ("data/Test/a.png", "test"),
        ("data/deep/VAL/b/a.png", "validation"),
        ("dev/a.png", "validation"),
        ("train2014/a.png", "train"),
        ("val_2/a.png", "validation"),
        ("evaluation/a.png", "test"),
        # The outermost folder decides.
        ("train/test/a.png", "train"),
        ("test.png", ""),
        ("trains/a.png", ""),
        ("attest/a.png", ""),
    ],
)
def test_the_outermost_folder_of_a_word_is_the_split(name, split):
    assert splits.of_folders(name) == split


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("pets-train-0000.tar", "train"),
        ("pets_Test_0.tar", "test"),
        ("validation.tar", "validation"),
        ("train/test-0.tar", "train"),
        ("train-and-test.tar", ""),
        ("contest-0.tar", ""),
        ("0000.tar", ""),
    ],
)
def test_the_name_of_a_tar_is_a_split_too(name, split):
    assert splits.of_archive(name) == split


def test_test_and_validation_pictures_never_train(pairs, prepared, rows):
    source = pairs("data/train/0", "data/train/1", "data/Test/0", "data/VALID/x/0")
    builder = sets.load(NAME, str(source), prepared)
    assert {split: set(rows(builder, split)) for split in builder.info.splits} == {
        "train": {"data/train/0.png", "data/train/1.png"},
        "test": {"data/Test/0.png"},
        "validation": {"data/VALID/x/0.png"},
    }


def test_rows_of_one_table_go_by_the_paths_of_their_pictures(pairs, prepared):
    names = [f"{split}/{n}" for split in ("train", "validation", "test") for n in range(2)]
    source = pairs(*names)
    lines = [f'{{"file_name": "{name}.png", "text": "a"}}\n' for name in names]
    (source / "metadata.jsonl").write_text("".join(lines))
    assert sizes(source, prepared) == {"train": 2, "validation": 2, "test": 2}


def test_tars_go_by_their_names(tmp_path, prepared):
    source = tmp_path / "tars"
    source.mkdir()
    for name, numbers in (("pets-train-0", range(3)), ("pets-test-0", range(3, 5))):
        with tarfile.open(source / f"{name}.tar", "w") as tar:
            for number in numbers:
                for suffix, data in (("png", picture(number)), ("txt", b"a pet")):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    assert sizes(source, prepared) == {"train": 3, "test": 2}


def test_no_picture_is_lost_beside_a_folder_for_validation(pairs, prepared):
    # Of those without a split every 20th was held out, and then forgotten.
    source = pairs(*(f"all/{n}" for n in range(40)), "val/0")
    assert sizes(source, prepared) == {"train": 40, "validation": 1}
    with pytest.raises(UserError, match="no images to train on"):
        sets.load(NAME, str(pairs("../other/test/0").parent / "other"), prepared)


def test_the_rule_and_words_that_are_not_used_are_told(pairs, prepared, caplog):
    caplog.set_level("INFO")
    sizes(pairs("train/0", "test/0", "my-test-set/0", "more/val_7"), prepared)
    assert "splits by the names of folders; 2 outside of them are for training" in caplog.text
    assert "2 names seem to say" in caplog.text and "but name no split" in caplog.text
    assert "my-test-set/0.png" in caplog.text or "more/val_7.png" in caplog.text
