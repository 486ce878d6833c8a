import pickle

import pytest

from vqd_jax.data import sets
from vqd_jax.errors import UserError


def lines(path):
    return dict(line.split() for line in path.read_text().splitlines())


@pytest.mark.parametrize("nested", [False, True])
def test_official_split(layout, prepared, rows, nested):
    source = layout("cub")
    # Move one image, so that the two splits differ as in the real data.
    split = source / "train_test_split.txt"
    split.write_text(split.read_text().replace("1 1\n", "1 0\n", 1))
    names, parts = lines(source / "images.txt"), lines(split)
    root = ""
    if nested:
        root = "CUB_200_2011/"
        (source / root).mkdir()
        for part in ("images", "images.txt", "train_test_split.txt", "classes.txt"):
            (source / part).rename(source / root / part)
    builder = sets.load("cub_text", str(source), prepared)
    assert builder.info.full_name == "cub_text/official/1.0.0"
    for split, flag in (("train", "1"), ("test", "0")):
        expected = {f"{root}images/{names[n]}" for n in names if parts[n] == flag}
        assert rows(builder, split).keys() == expected
        assert len(expected) == {"train": 17, "test": 7}[split]
    assert sets.evaluation_split(builder) == "test"


def test_published_split(layout, prepared, rows):
    source = layout("cub")
    builder = sets.load("cub_text/published", str(source), prepared)
    for split in ("train", "test"):
        names = pickle.loads((source / split / "filenames.pickle").read_bytes())
        assert rows(builder, split).keys() == {f"images/{n}.jpg" for n in names}


def test_records_hold_the_files(layout, prepared, rows):
    source = layout("cub")
    builder = sets.load("cub_text", str(source), prepared)
    classes = [line.split()[1] for line in (source / "classes.txt").read_text().splitlines()]
    assert builder.info.features["label"].names == classes
    for file, record in rows(builder, "train").items():
        assert record["image"] == (source / file).read_bytes()
        texts = (source / file.replace("images", "text_c10")).with_suffix(".txt").read_text()
        assert record["captions"] == texts.splitlines()
        assert len(record["captions"]) == 10
        assert classes[record["label"]] == file.split("/")[1]


@pytest.mark.parametrize("folder", ["text/text", "cvpr2016_cub/text_c10"])
def test_captions_in_other_places(layout, prepared, rows, folder):
    source = layout("cub")
    (source / "text_c10").rename(source / "moved")
    if folder.startswith("cvpr"):
        (source / folder).parent.mkdir()
        (source / "moved").rename(source / folder)
    builder = sets.load("cub_text", str(source), prepared)
    assert {len(r["captions"]) for r in rows(builder, "train").values()} == {10}


class Attack:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return (open, ("attacked", "w"))


@pytest.mark.parametrize(
    "value", [Attack(), [Attack()], {"a": 1}, [1, 2], ["a", b"b"], "text", set()]
)
def test_a_pickle_of_anything_but_names_is_refused(layout, prepared, tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    source = layout("cub")
    (source / "train/filenames.pickle").write_bytes(pickle.dumps(value, protocol=2))
    with pytest.raises(UserError, match=r"train/filenames\.pickle is not a pickled list of names"):
        sets.load("cub_text/published", str(source), prepared)
    assert not (tmp_path / "attacked").exists()


def test_a_pickle_of_python_2_is_read(layout, prepared, rows):
    source = layout("cub")
    path = source / "train/filenames.pickle"
    names = pickle.loads(path.read_bytes())
    # Protocol 0, str of Python 2: each a quoted line.
    old = b"(lp0\n" + b"".join(b"S'%s'\na" % n.encode() for n in names) + b"."
    path.write_bytes(old)
    builder = sets.load("cub_text/published", str(source), prepared)
    assert rows(builder, "train").keys() == {f"images/{n}.jpg" for n in names}


def test_a_split_that_does_not_fit_is_named(layout, prepared):
    source = layout("cub")
    path = source / "train_test_split.txt"
    path.write_text(path.read_text().replace("1 1\n", "1 2\n", 1))
    with pytest.raises(UserError, match="train_test_split.txt does not give 0 or 1 for each image"):
        sets.load("cub_text", str(source), prepared)


def test_conversion_marks_in_captions_become_spaces(layout, prepared, rows):
    source = layout("cub")
    path = next((source / "text_c10/001.Rooster").iterdir())
    path.write_text("a bird\ufffd\ufffdwith  a beak \n\n \n", encoding="utf-8")
    builder = sets.load("cub_text", str(source), prepared)
    assert rows(builder, "train")[f"images/001.Rooster/{path.stem}.jpg"]["captions"] == [
        "a bird with a beak"
    ]
