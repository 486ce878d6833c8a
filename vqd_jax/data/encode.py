"""From a config to its cached codes: which codes a run needs, and making what of them is missing.

Letters: R records, C crops of an image, B batch, S image side, N image tokens, L text tokens,
K codes.

Every process takes the shards p, p + P, p + 2P, ... (see ``shard_writer``), so that an interrupted
encoding goes on with the next shard. The process that finds all shards there writes the manifest.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

from vqd_jax import config as config_lib
from vqd_jax import files
from vqd_jax.data import bad_records, batches, codes, order, sets
from vqd_jax.data.batches import Crop
from vqd_jax.data.shard_writer import Content, ShardWriter, counts_of
from vqd_jax.data.text import ClipTokenizer, TextFeatures
from vqd_jax.errors import UserError
from vqd_jax.models import autoencoder, quantizer
from vqd_jax.models.autoencoder import AutoencoderConfig
from vqd_jax.parallel import processes, rows

TRAIN = "train"
ORIGIN = "origin.json"
REMAP = "remap.npy"
# Images on each device in one call of the autoencoder.
BATCH_PER_DEVICE = 32


class Codec:
    """An autoencoder on all devices of this process, each of which takes its part of the images.

    Args:
      sizes: of the autoencoder.
      params: its parameters.

    Attributes:
      num_codes: K.
      num_tokens: N.
      batch_size: images in a call that fills the devices.
    """

    def __init__(self, sizes: AutoencoderConfig, params: Any):
        devices = jax.local_devices()
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

    def _call(self, function, inputs):
        missing = -len(inputs) % self._num_devices
        whole = rows.padded(inputs, len(inputs) + missing)
        made = function(self._params, jax.device_put(whole, self._rows))
        return made[: len(inputs)] if missing else made


def data_set(config: ConfigDict) -> tfds.core.DatasetBuilder:
    """The data set of the config, which is prepared if it is not yet; see ``sets.load``."""
    c = config.data
    return sets.load(c.name, c.dir, c.prepared_dir, c.max_bad_share, c.beam)


def crop(config: ConfigDict, split: str) -> Crop:
    """From the images of a split to what the autoencoder sees."""
    size = config.data.image_size
    if split != TRAIN:
        return Crop(size)
    return Crop(size, random=config.data.random_crop, flip=config.data.flip)


def record_weights(config: ConfigDict, builder: tfds.core.DatasetBuilder) -> np.ndarray | None:
    """How often training takes each record of the train split, float64 [R]; None is equally often.

    Raises:
      UserError: no record has what ``config.data.balance_by`` or ``hold_out`` names, or all are
        held out.
    """
    name, hold_out = config.data.balance_by, set(config.data.hold_out)
    if not name and not hold_out:
        return None
    for feature in {name} - {""} | ({"captions"} if hold_out else set()):
        if feature not in builder.info.features:
            raise UserError(
                f"config.data.balance_by={name!r}, hold_out={len(hold_out)} captions: "
                f"{builder.info.full_name} has no feature {feature!r}; it has "
                f"{', '.join(sorted(builder.info.features))}"
            )
    source = batches.records(builder, TRAIN, decode=False)
    groups, held, missing = [], [], set(hold_out)
    # One record at a time: all of them, with their pictures, may not fit into memory.
    for i in range(len(source)):
        record = source[i]
        captions = hold_out.intersection(record.get("captions", ()))
        held.append(bool(captions))
        missing -= captions
        groups.append(str(record[name]) if name else str(i))
    held = np.array(held)
    if missing:
        raise UserError(f"config.data.hold_out: no training record has {sorted(missing)[0]!r}")
    if held.all():
        raise UserError("config.data.hold_out leaves no training record")
    weights = np.zeros(len(held))
    weights[~held] = order.balanced_weights(np.array(groups)[~held], config.data.balance_power)
    return weights


def num_crops(config: ConfigDict, split: str) -> int:
    """Crops of each image that are cached."""
    return config.data.num_crops if split == TRAIN else 1


def content(config: ConfigDict, text_features: TextFeatures | None = None) -> Content:
    """What the denoiser's condition needs beside the codes.

    Args:
      config: the resolved config.
      text_features: of the config's pretrained text encoder, if they are to be cached.
    """
    if config.denoiser.condition == "text":
        return Content(ClipTokenizer(config.text_encoder.context_length), text_features)
    if config.denoiser.condition == "class":
        return Content(num_classes=config.denoiser.num_classes)
    return Content()


def directory(config: ConfigDict, workdir: str) -> str:
    """Where the codes of a run are: a folder with a folder for each split."""
    return config.data.codes or str(Path(workdir) / "codes")


def make(
    config: ConfigDict,
    where: str,
    builder: tfds.core.DatasetBuilder,
    split: str,
    params: Any,
    content: Content,
    records_per_shard: int = 4096,
) -> dict[str, Any] | None:
    """Encodes what is missing of ``where/split``; see ``encode_split``."""
    codec = Codec(config_lib.autoencoder_config(config), params)
    return encode_split(
        str(Path(where) / split),
        batches.records(builder, split, decode=False),
        codec,
        {
            "data": sets.source_fingerprint(builder),
            "split": split,
            "autoencoder": files.fingerprint(params),
        },
        crop=crop(config, split),
        num_crops=num_crops(config, split),
        seed=config.seed,
        content=content,
        batch_size=codec.batch_size,
        max_bad_share=config.data.max_bad_share,
        records_per_shard=records_per_shard,
    )


def open_or_make(
    config: ConfigDict,
    workdir: str,
    builder: tfds.core.DatasetBuilder,
    split: str,
    params: Any,
    content: Content,
) -> codes.CodesSource:
    """The cached codes of a split: in ``config.data.codes``, or made in ``workdir/codes``.

    Args:
      config: the resolved config.
      workdir: of the run.
      builder: the prepared data set.
      split: its name.
      params: of the autoencoder.
      content: what the config asks for; see the function ``content``.

    Raises:
      UserError: the codes are damaged, or another autoencoder or other settings made them.
    """
    where = directory(config, workdir)
    if not config.data.codes:
        make(config, where, builder, split, params, content)
    return open_split(config, where, split, params, content)


def open_split(
    config: ConfigDict, where: str, split: str, params: Any, content: Content
) -> codes.CodesSource:
    """The codes in ``where/split``, if they are what the arguments of ``open_or_make`` ask for.

    Codes of another data set will do, if the same autoencoder made them.

    Raises:
      UserError: see ``open_or_make``.
    """
    wanted = {
        "split": split,
        "autoencoder": files.fingerprint(params),
        "image_size": config.data.image_size,
        "text_encoder": None,
    }
    return codes.open_split(str(Path(where) / split), wanted | content.origin())


def encode_split(
    directory: str,
    source: Sequence[dict],
    codec: Codec,
    origin: Mapping[str, Any],
    *,
    crop: Crop,
    content: Content,
    num_crops: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    records_per_shard: int = 4096,
    max_bad_share: float = 0.01,
    process_index: int | None = None,
    process_count: int | None = None,
) -> dict[str, Any] | None:
    """Encodes a split into ``directory``, or what of it is not there yet.

    Args:
      directory: of this split alone; ``codes`` says what is written.
      source: R random-access records with ``image``, bytes or pixels.
      codec: the autoencoder.
      origin: JSON values that decide the codes: ``data``, ``split``, ``autoencoder`` (fingerprint).
      crop: from images to S x S.
      content: what is cached beside the codes.
      num_crops: C; more than one makes sense for random crops only.
      seed: of the random crops.
      batch_size: images in one call of the codec.
      records_per_shard: the work that an interruption costs at most.
      max_bad_share: share of bad records that stops the run.
      process_index, process_count: None asks JAX.

    Returns:
      The manifest, or None if other processes have not finished their shards.

    Raises:
      UserError: the folder has codes of another origin, or too many records are bad.
      OSError: the disk is full, or a record or the folder cannot be read or written.
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    plan = _Plan(Path(directory), len(source), records_per_shard)
    origin = full_origin(origin, crop, num_crops, seed, content)
    origin["records_per_shard"] = records_per_shard
    _claim(plan.folder, origin)
    log, captions = str(plan.folder / bad_records.FILE), content.tokenizer is not None
    read = bad_records.CheckedReader(source, max_bad_share, log, needs_captions=captions)
    writer = ShardWriter(read, codec, crop, num_crops, seed, content, batch_size)
    plan.write_shards(writer, index, count)
    processes.barrier(f"encoded {directory}")
    return _manifest(plan, origin, codec, num_crops, content)


def full_origin(
    origin: Mapping[str, Any], crop: Crop, num_crops: int, seed: int, content: Content
) -> dict[str, Any]:
    """All that decides the codes, as ``codes.open_split`` compares it; see ``encode_split``."""
    made_with = {
        "image_size": crop.size,
        "random_crop": crop.random,
        "flip": crop.flip,
        "num_crops": num_crops,
        "crop_seed": seed if crop.random or crop.flip else 0,
    }
    return dict(origin) | made_with | content.origin()


def _claim(folder: Path, origin: dict[str, Any]) -> None:
    """Writes the origin into an empty folder; refuses one with another."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ORIGIN
    if not path.exists():
        with files.lock(folder / ".lock"):
            if not path.exists():
                files.remove_remains(path)
                (folder / bad_records.FILE).unlink(missing_ok=True)
                files.write_json(path, origin)
    codes.require_origin(folder, files.read_json(path, codes.REMEDY), origin)


class _Plan(NamedTuple):
    """Which records belong to which shard."""

    folder: Path
    num_records: int
    records_per_shard: int

    @property
    def num_shards(self) -> int:
        return math.ceil(self.num_records / self.records_per_shard)

    def records(self, shard: int) -> range:
        start = shard * self.records_per_shard
        return range(start, min(start + self.records_per_shard, self.num_records))

    def path(self, shard: int) -> Path:
        return self.folder / f"codes-{shard:05d}-of-{self.num_shards:05d}.array_record"

    def missing(self, shards: Sequence[int]) -> list[int]:
        return [shard for shard in shards if counts_of(self.path(shard)) is None]

    def write_shards(self, writer: ShardWriter, index: int, count: int) -> None:
        """Writes what is missing of the shards of process ``index`` of ``count``."""
        shards = range(index, self.num_shards, count)
        missing = self.missing(shards)
        if not missing:
            return
        total = sum(len(self.records(shard)) for shard in shards)
        bar = tqdm(
            total=total,
            initial=total - sum(len(self.records(shard)) for shard in missing),
            desc=f"encoding {self.folder.name}",
            unit="image",
            mininterval=1,
        )
        with bar:
            for shard in missing:
                path = self.path(shard)
                # Two runs may share a folder of codes.
                with files.lock(path.with_name(f".{path.stem}.lock")):
                    if counts_of(path) is None:
                        writer.write(self.records(shard), path, bar)


def _manifest(
    plan: _Plan, origin: dict[str, Any], codec: Codec, num_crops: int, content: Content
) -> dict[str, Any] | None:
    """The manifest of a split, written if all shards are there; None if one is not."""
    if plan.missing(range(plan.num_shards)):
        return None
    path = plan.folder / codes.MANIFEST
    if not path.exists():
        with files.lock(plan.folder / ".lock"):
            if not path.exists():
                manifest = {"format": codes.FORMAT, "origin": origin}
                _write_manifest(manifest, plan, codec, num_crops, content)
    return files.read_json(path, codes.REMEDY)


def _write_manifest(manifest, plan, codec, num_crops, content) -> None:
    folder = plan.folder
    shards = [counts_of(plan.path(shard)) for shard in range(plan.num_shards)]
    totals = {
        "records": sum(shard["records"] for shard in shards),
        "bad_records": sum(len(shard["bad"]) for shard in shards),
        "captions": sum(shard["captions"] for shard in shards),
        "captions_truncated": sum(shard["truncated"] for shard in shards),
        "psnr_images": sum(shard.get("psnr_images", 0) for shard in shards),
    }
    if not totals["records"]:
        raise UserError(
            f"nothing could be encoded into {folder}: {totals['bad_records']} records are bad"
        )
    psnr = sum(shard.get("psnr_sum", 0.0) for shard in shards) / totals["psnr_images"]
    usage = np.sum([shard["usage"] for shard in shards], axis=0)
    share = usage[usage > 0] / usage.sum()
    null_ids, null_features = content.null()
    manifest |= {
        "layout": {
            "num_tokens": codec.num_tokens,
            "num_crops": num_crops,
            "context_length": len(null_ids),
            "feature_width": content.text_features.width if content.text_features else 0,
            "null_text_ids": null_ids.tolist(),
            "num_classes": content.num_classes,
        },
        **totals,
        "psnr": psnr,
        "num_codes": codec.num_codes,
        "codes_used": int((usage > 0).sum()),
        "perplexity": float(np.exp(-np.sum(share * np.log(share)))),
        "shards": [{key: shard[key] for key in ("file", "records", "bytes")} for shard in shards],
    }
    arrays = {REMAP: quantizer.build_remap(usage)}
    if null_features is not None:
        arrays[codes.NULL_FEATURES] = null_features
    for name, array in arrays.items():
        files.remove_remains(folder / name)
        with files.appearing(folder / name) as scratch:
            np.save(scratch, array)
    # The manifest comes last: with it the split is complete.
    files.remove_remains(folder / codes.MANIFEST)
    files.write_json(folder / codes.MANIFEST, manifest)
    logging.info(
        "%s: %d records (%d bad ones left out), %d of %d captions cut to fit; %d of %d codes in "
        "use, perplexity %.1f; PSNR %.2f dB of %d reconstructions",
        folder, manifest["records"], manifest["bad_records"], manifest["captions_truncated"],
        manifest["captions"], manifest["codes_used"], codec.num_codes, manifest["perplexity"],
        manifest["psnr"], manifest["psnr_images"],
    )  # fmt: skip
