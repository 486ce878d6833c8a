import pathlib
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

LAYOUTS = pathlib.Path(__file__).parents[1] / "layouts"


@pytest.fixture
def layout(tmp_path):
    """layout('coco') -> a copy of that tree, which a test may change."""

    def layout(name):
        return pathlib.Path(shutil.copytree(LAYOUTS / name, tmp_path / "source" / name))

    return layout


@pytest.fixture
def prepared(tmp_path):
    """A directory for prepared sets, apart from their sources."""
    return str(tmp_path / "prepared")


@pytest.fixture(scope="session")
def rows():
    """rows(builder, split) -> {file: record}, with images as stored and texts as str."""

    def rows(builder, split):
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        found = {}
        for record in source:
            record = {k: v.item() if isinstance(v, np.generic) else v for k, v in record.items()}
            record["file"] = record["file"].decode()
            record["captions"] = [c.decode() for c in record["captions"]]
            found[record["file"]] = record
        assert len(found) == len(source) == builder.info.splits[split].num_examples
        return found

    return rows


@pytest.fixture(scope="session")
def all_rows(rows):
    """all_rows(builder) -> {split: rows}."""
    return lambda builder: {split: rows(builder, split) for split in builder.info.splits}
