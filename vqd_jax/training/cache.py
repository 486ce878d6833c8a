"""The cached codes of a run: made in its workdir, or taken from where the config says."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vqd_jax import config as config_lib
from vqd_jax.data import batches, codes, encode, sets
from vqd_jax.data.text import ClipTokenizer
from vqd_jax.interop import folder, pretrained
from vqd_jax.models import autoencoder, text_encoder
from vqd_jax.models.autoencoder import AutoencoderConfig

TRAIN = "train"
# Images on each device in one call of the autoencoder.
BATCH_PER_DEVICE = 32


class Codec:
    """An autoencoder on all devices of this process, each with its part of the images.

    Args:
      sizes: of the autoencoder.
      params: its parameters.
      devices: None is all of this process.
    """

    def __init__(
        self, sizes: AutoencoderConfig, params: Any, devices: Sequence[jax.Device] | None = None
    ):
        devices = jax.local_devices() if devices is None else devices
        mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
        self.num_codes, self.num_tokens = sizes.num_codes, sizes.num_tokens
        self.batch_size = BATCH_PER_DEVICE * len(devices)
        self._rows = NamedSharding(mesh, PartitionSpec("data"))
        self._num_devices = len(devices)
        self._params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        self._encode = jax.jit(functools.partial(autoencoder.encode, config=sizes))
        self._decode = jax.jit(functools.partial(autoencoder.decode, config=sizes))

    def encode(self, images: np.ndarray) -> jax.Array:
        """uint8 [B, S, S, 3] -> int32 [B, N]; returns before it is computed."""
        return self._call(self._encode, images)

    def decode(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, N] -> uint8 [B, S, S, 3]; returns before it is computed."""
        return self._call(self._decode, tokens)

    def _call(self, function, rows):
        missing = -len(rows) % self._num_devices
        padded = np.concatenate([rows, rows[:1].repeat(missing, 0)]) if missing else rows
        made = function(self._params, jax.device_put(padded, self._rows))
        return made[: len(rows)] if missing else made


def data_set(config: ConfigDict) -> tfds.core.DatasetBuilder:
    """The data set of the config, prepared if it is not yet; see ``sets.load``."""
    c = config.data
    return sets.load(c.name, c.dir, c.prepared_dir, c.max_bad_share, c.beam)


def crop(config: ConfigDict, split: str) -> batches.Crop:
    """From the images of a split to what the autoencoder sees."""
    size = config.data.image_size
    if split != TRAIN:
        return batches.Crop(size)
    return batches.Crop(size, random=config.data.random_crop, flip=config.data.flip)


def num_crops(config: ConfigDict, split: str) -> int:
    """Crops of an image that are cached."""
    return config.data.num_crops if split == TRAIN else 1


def content(config: ConfigDict) -> encode.Content:
    """What the denoiser's condition needs beside the codes."""
    if config.denoiser.condition == "text":
        tokenizer = ClipTokenizer(config.text_encoder.context_length)
        return encode.Content(tokenizer=tokenizer, text_features=_text_features(config))
    if config.denoiser.condition == "class":
        return encode.Content(num_classes=config.denoiser.num_classes)
    return encode.Content()


def _text_features(config: ConfigDict) -> encode.TextFeatures | None:
    """Features by the pretrained text encoder, if they are to be cached."""
    if not config.data.cache_text_features:
        return None
    sizes = dataclasses.replace(config_lib.model_config(config).text_encoder, dtype="float32")
    params = pretrained.load_text_encoder(config)
    compute = jax.jit(lambda params, ids: text_encoder.bind(sizes, params)(ids))
    return encode.TextFeatures(
        functools.partial(compute, params), sizes.width, _fingerprint(params)
    )


def directory(config: ConfigDict, workdir: str) -> str:
    """Where the codes of a run are: each split has a folder in it."""
    return config.data.codes or str(Path(workdir) / "codes")


def make(
    config: ConfigDict,
    where: str,
    builder: tfds.core.DatasetBuilder,
    split: str,
    params: Any,
    records_per_shard: int = 4096,
) -> dict[str, Any] | None:
    """Encodes what is missing of ``where/split``; see ``encode.encode_split``."""
    codec = Codec(config_lib.autoencoder_config(config), params)
    return encode.encode_split(
        str(Path(where) / split),
        batches.records(builder, split, decode=False),
        codec,
        {
            "data": sets.source_fingerprint(builder),
            "split": split,
            "autoencoder": _fingerprint(params),
        },
        crop=crop(config, split),
        num_crops=num_crops(config, split),
        seed=config.seed,
        content=content(config),
        batch_size=codec.batch_size,
        max_bad_share=config.data.max_bad_share,
        records_per_shard=records_per_shard,
    )


def open_or_make(
    config: ConfigDict, workdir: str, builder: tfds.core.DatasetBuilder, split: str, params: Any
) -> codes.CodesSource:
    """The cached codes of a split: in ``config.data.codes``, or made in ``workdir/codes``.

    Args:
      config: the resolved config.
      workdir: of the run.
      builder: the prepared data set.
      split: its name.
      params: of the autoencoder.

    Raises:
      UserError: codes that another autoencoder or other settings made, or damaged ones.
    """
    where = directory(config, workdir)
    if not config.data.codes:
        make(config, where, builder, split, params)
    return open_split(config, where, split, params)


def open_split(config: ConfigDict, where: str, split: str, params: Any) -> codes.CodesSource:
    """The codes in ``where/split``, if they are what ``config`` and ``params`` ask for.

    The data set is left open: another one will do, if its codes are of the same autoencoder.

    Raises:
      UserError: see ``open_or_make``.
    """
    made_with = content(config)
    wanted = {
        "split": split,
        "autoencoder": _fingerprint(params),
        "image_size": config.data.image_size,
        "num_classes": made_with.num_classes,
        "context_length": made_with.tokenizer.context_length if made_with.tokenizer else 0,
        "text_encoder": made_with.text_features and made_with.text_features.fingerprint,
    }
    return codes.open_split(str(Path(where) / split), wanted)


def _fingerprint(params: Any) -> str:
    return codes.fingerprint(folder.flatten(params))
