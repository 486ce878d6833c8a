import shutil

import pytest

from vqd_jax.data import sets


def spread(source, names):
    """Copies the first face under other numbers."""
    folder = source / "images256x256"
    first = (folder / "00000.png").read_bytes()
    shutil.rmtree(folder)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(first)


@pytest.mark.parametrize("nested", [False, True])
def test_the_authors_split(layout, prepared, rows, nested):
    source = layout("ffhq")
    numbers = (0, 7, 59999, 60000, 69999)
    names = [f"{n - n % 1000:05d}/" * nested + f"{n:05d}.png" for n in numbers]
    spread(source, names)
    (source / "images256x256/LICENSE.txt").write_text("not an image")
    builder = sets.load("ffhq_images", str(source), prepared)
    files = [f"images256x256/{name}" for name in names]
    assert sorted(rows(builder, "train")) == files[:3]
    assert sorted(rows(builder, "validation")) == files[3:]
    assert sets.bad_records(builder) == []


def test_a_part_of_the_set_holds_out_every_20th(layout, prepared, rows):
    source = layout("ffhq")
    spread(source, [f"{n:05d}.png" for n in range(45)])
    builder = sets.load("ffhq_images", str(source), prepared)
    held = [f"images256x256/{n:05d}.png" for n in (19, 39)]
    assert sorted(rows(builder, "validation")) == held
    assert len(rows(builder, "train")) == 43


def test_records_are_the_files(layout, prepared, rows):
    source = layout("ffhq")
    builder = sets.load("ffhq_images", str(source), prepared)
    for split in ("train", "validation"):
        [record] = rows(builder, split).values()
        assert record["image"] == (source / record["file"]).read_bytes()
        assert record["captions"] == []
        assert "label" not in record
