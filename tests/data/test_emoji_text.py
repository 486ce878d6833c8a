import importlib.resources
import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from vqd_jax.data import batches

COUNTS = {"train": 3155, "validation": 176, "test": 193}


@pytest.fixture(scope="module")
def archive():
    path = importlib.resources.files("vqd_jax.data").joinpath("assets/noto_emoji_64.zip")
    with path.open("rb") as file, zipfile.ZipFile(file) as pictures:
        yield pictures


def test_splits_are_those_of_the_archive(emoji):
    assert {k: v.num_examples for k, v in emoji.info.splits.items()} == COUNTS


@pytest.mark.parametrize("split", COUNTS)
def test_records_equal_the_archive(emoji, archive, split):
    lines = archive.read("captions.jsonl").decode().splitlines()
    rows = {r["file"][7:-5]: r for r in map(json.loads, lines) if r["split"] == split}
    source = batches.records(emoji, split)
    found = [source[i] for i in range(0, len(source), 1 if split == "test" else 40)]
    for record in found:
        row = rows.pop(record["file"])
        assert record["captions"] == row["captions"]
        assert record["concept"] == row["concept"]
        assert record["category"] == row["category"]
        assert record["skin_tone"] == (row["skin_tone"] or "")
        image = np.asarray(Image.open(io.BytesIO(archive.read(row["file"]))).convert("RGB"))
        np.testing.assert_array_equal(record["image"], image)
    if split == "test":
        assert not rows


def test_source_and_licence_are_stated(emoji):
    assert "Apache License 2.0" in emoji.info.redistribution_info.license
    assert "googlefonts/noto-emoji" in emoji.info.citation
    names = {p.name for p in importlib.resources.files("vqd_jax.data").joinpath("assets").iterdir()}
    texts = ("LICENSE", "NOTICE", "LICENSE-Unicode", "LICENSE-emoji-datasource-MIT")
    assert {f"noto_emoji_64.{t}" for t in texts} <= names
