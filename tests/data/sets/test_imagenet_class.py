import shutil

import pytest

from vqd_jax.data import sets
from vqd_jax.errors import UserError

CLASSES = ["n01440764", "n01443537", "n01484850", "n01514668"]


def test_records_are_the_files(layout, prepared, rows):
    source = layout("imagenet")
    builder = sets.load("imagenet_class", str(source), prepared)
    assert builder.info.features["label"].names == CLASSES
    for split, phase in (("train", "train"), ("validation", "val")):
        found = rows(builder, split)
        assert found.keys() == {str(p.relative_to(source)) for p in source.glob(f"{phase}/*/*")}
        for file, record in found.items():
            assert record["image"] == (source / file).read_bytes()
            assert record["captions"] == []
            assert CLASSES[record["label"]] == file.split("/")[1]


def flatten_validation(source):
    lines = ["ImageId,PredictionString"]
    for path in sorted(source.glob("val/*/*")):
        lines.append(f"{path.stem},{path.parent.name} 1 2 3 4 {path.parent.name} 5 6 7 8 ")
        path.rename(source / "val" / path.name)
    for folder in CLASSES:
        (source / "val" / folder).rmdir()
    return "\n".join(lines) + "\n"


def test_validation_images_in_one_folder(layout, prepared, rows, tmp_path):
    source = layout("imagenet")
    first = rows(sets.load("imagenet_class", str(source), prepared), "validation")
    solution = flatten_validation(source)
    with pytest.raises(UserError, match="looked for LOC_val_solution.csv"):
        sets.load("imagenet_class", str(source), str(tmp_path / "flat"))
    (source / "LOC_val_solution.csv").write_text(solution)
    builder = sets.load("imagenet_class", str(source), str(tmp_path / "flat"))
    flat = {file.split("/")[-1]: r["label"] for file, r in rows(builder, "validation").items()}
    assert flat == {file.split("/")[-1]: r["label"] for file, r in first.items()}


def test_the_layout_of_the_kaggle_archive(layout, prepared, tmp_path):
    source = layout("imagenet")
    root = tmp_path / "kaggle"
    shutil.copytree(source, root / "ILSVRC/Data/CLS-LOC")
    builder = sets.load("imagenet_class", str(root), prepared)
    assert builder.info.splits["train"].num_examples == 20


def test_images_of_unknown_classes_are_bad(layout, prepared):
    source = layout("imagenet")
    (source / "val/n01514668").rename(source / "val/n09999999")
    shutil.copy(next((source / "train/n01440764").iterdir()), source / "train/stray.JPEG")
    builder = sets.load("imagenet_class", str(source), prepared, max_bad_share=0.2)
    reasons = {bad["file"]: bad["reason"] for bad in sets.bad_records(builder)}
    assert len(reasons) == 3
    assert reasons.pop("train/stray.JPEG") == "class train, which train does not have"
    assert set(reasons.values()) == {"class n09999999, which train does not have"}
