import pytest
import scipy.io

from vqd_jax.data import sets
from vqd_jax.data.sets import oxford102_text
from vqd_jax.errors import UserError


def test_records_equal_the_tables(layout, prepared, rows):
    source = layout("oxford102")
    builder = sets.load("oxford102_text", str(source), prepared)
    labels = scipy.io.loadmat(source / "imagelabels.mat")["labels"][0]
    numbers = scipy.io.loadmat(source / "setid.mat")
    for split, key in (("train", "trnid"), ("validation", "valid"), ("test", "tstid")):
        found = rows(builder, split)
        assert len(found) == {"train": 8, "validation": 4, "test": 12}[split]
        for number in numbers[key][0]:
            record = found.pop(f"jpg/image_{number:05d}.jpg")
            label = labels[number - 1]
            assert record["label"] == label - 1
            assert record["image"] == (source / record["file"]).read_bytes()
            text = source / f"text_c10/class_{label:05d}/image_{number:05d}.txt"
            assert record["captions"] == text.read_text().splitlines()
        assert not found


def test_classes_are_the_published_ones():
    names = oxford102_text.class_names()
    assert len(set(names)) == 102
    assert (names[0], names[72], names[101]) == ("pink primrose", "water lily", "blackberry lily")


@pytest.mark.parametrize("name", ["imagelabels.mat", "setid.mat"])
def test_a_damaged_table_is_named(layout, prepared, name):
    source = layout("oxford102")
    data = (source / name).read_bytes()
    (source / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=f"{name} has no table"):
        sets.load("oxford102_text", str(source), prepared)


def test_images_without_a_class_are_bad(layout, prepared):
    source = layout("oxford102")
    labels = scipy.io.loadmat(source / "imagelabels.mat")["labels"]
    scipy.io.savemat(source / "imagelabels.mat", {"labels": labels[:, :-1]})
    builder = sets.load("oxford102_text", str(source), prepared, max_bad_share=0.1)
    assert sets.bad_records(builder) == [
        {"file": "jpg/image_00024.jpg", "reason": "imagelabels.mat has no class for it"}
    ]
