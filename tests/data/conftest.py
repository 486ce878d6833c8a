import pytest

from vqd_jax.data import builders
from vqd_jax.data.builders.shapes_text import ShapesConfig, ShapesText


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def emoji(data_dir):
    """The prepared emoji builder."""
    return builders.load("emoji_text", data_dir)


@pytest.fixture(scope="session")
def shapes(data_dir):
    """A prepared shapes builder of 60 training and 20 test examples of 32 pixels."""
    config = ShapesConfig(name="tiny", seed=3, num_train=60, num_validation=10, num_test=20)
    builder = ShapesText(data_dir=data_dir, config=config)
    builder.download_and_prepare(file_format="array_record")
    return builder
