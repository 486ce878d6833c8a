import numpy as np
import pytest

from vqd_jax.data import codes, encode, sets
from vqd_jax.data.batches import Crop
from vqd_jax.data.sets.shapes_text import ShapesConfig, ShapesText
from vqd_jax.data.text import ClipTokenizer


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def emoji(data_dir):
    """The prepared emoji builder."""
    return sets.load("emoji_text", data_dir)


@pytest.fixture(scope="session")
def shapes(data_dir):
    """A prepared shapes builder of 60 training and 20 test examples of 32 pixels."""
    config = ShapesConfig(name="tiny", seed=3, num_train=60, num_validation=10, num_test=20)
    builder = ShapesText(data_dir=data_dir, config=config)
    builder.download_and_prepare(file_format="array_record")
    return builder


class PixelCodec:
    """Takes the first six pixels of an image for its codes; an image of one value is kept."""

    num_codes, num_tokens = 256, 6

    def encode(self, images):
        return images[:, 0, :6, 0].astype(np.int32)

    def decode(self, tokens):
        return np.broadcast_to(np.asarray(tokens)[:, :1, None, None], (len(tokens), 8, 8, 3))


@pytest.fixture(scope="session")
def pixel_codec():
    return PixelCodec()


def plain_records(count, bad=()):
    """Pictures of one value, the record's number, with one to three captions that name it."""

    def record(r):
        if r in bad:
            return {"image": b"no image", "captions": ["a"], "label": 0, "file": f"{r}.png"}
        captions = [f"{r} {i}" for i in range(1 + r % 3)]
        return {
            "image": np.full((8, 8, 3), r % 256, np.uint8),
            "captions": captions,
            "label": r % 5,
        }

    return [record(r) for r in range(count)]


@pytest.fixture(scope="session")
def make_cache():
    """make_cache(folder, count) -> the folder, in which plain records are encoded."""

    def make_cache(folder, count, bad=(), content=None, autoencoder="first", **options):
        if content is None:
            content = encode.Content(tokenizer=ClipTokenizer(8))
        options = {"batch_size": 4, "records_per_shard": 16, "max_bad_share": 0.5} | options
        encode.encode_split(
            str(folder),
            options.pop("source", None) or plain_records(count, bad),
            options.pop("codec", PixelCodec()),
            {"data": "plain", "autoencoder": autoencoder} | options.pop("origin", {}),
            crop=options.pop("crop", Crop(8)),
            content=content,
            **options,
        )
        return folder

    return make_cache


@pytest.fixture(scope="session")
def cached(make_cache, tmp_path_factory):
    """Fifty plain records in four shards."""
    return codes.open_split(str(make_cache(tmp_path_factory.mktemp("cached"), 50)))
