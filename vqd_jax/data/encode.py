"""Images -> cached codes, shard by shard: an interrupted encoding goes on with the next shard.

Letters: R records, C crops an image, B batch, S image side, N image tokens, n captions of a record,
L text tokens, D width of text features, K codes.

Every process takes the shards p, p + P, p + 2P, ... A shard is a range of records; it appears by a
rename, complete, and whoever completes the last one writes the manifest.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import grain
import jax
import numpy as np
from absl import logging
from array_record.python import array_record_module
from jax.experimental import multihost_utils
from tqdm import tqdm

from vqd_jax.data import bad_records, codes
from vqd_jax.data.bad_records import CheckedReader
from vqd_jax.data.batches import Crop
from vqd_jax.data.codes import CachedRecord
from vqd_jax.data.text import ClipTokenizer
from vqd_jax.errors import UserError
from vqd_jax.models import quantizer

ORIGIN = "origin.json"
REMAP = "remap.npy"


class Codec(Protocol):
    """An autoencoder, as a pair of compiled functions.

    Attributes:
      num_codes: K.
      num_tokens: N.
    """

    num_codes: int
    num_tokens: int

    def encode(self, images: np.ndarray) -> jax.Array:
        """uint8 [B, S, S, 3] -> integers [B, N]."""

    def decode(self, tokens: jax.Array) -> jax.Array:
        """Integers [B, N] -> uint8 [B, S, S, 3]."""


class TextFeatures(NamedTuple):
    """Features of captions that are cached beside their ids.

    Attributes:
      compute: int32 [B, L] -> floats [B, L, D].
      width: D.
      fingerprint: tells one text encoder from another; see ``codes.fingerprint``.
    """

    compute: Callable[[np.ndarray], jax.Array]
    width: int
    fingerprint: str = ""


class Content(NamedTuple):
    """What is cached of a record beside its crops.

    Attributes:
      tokenizer: of the records' ``captions``; None leaves captions out.
      text_features: of the captions; None leaves them out.
      num_classes: of the records' ``label``; 0 leaves labels out.
    """

    tokenizer: ClipTokenizer | None = None
    text_features: TextFeatures | None = None
    num_classes: int = 0


_NOTHING = Content()


def encode_split(
    directory: str,
    source: Sequence[dict],
    codec: Codec,
    origin: Mapping[str, Any],
    *,
    crop: Crop,
    num_crops: int = 1,
    seed: int = 0,
    content: Content = _NOTHING,
    batch_size: int = 32,
    records_per_shard: int = 4096,
    max_bad_share: float = 0.01,
    num_threads: int = 4,
    process_index: int | None = None,
    process_count: int | None = None,
) -> dict[str, Any] | None:
    """Encodes a split into ``directory``, or what of it is not there yet.

    Args:
      directory: of this split alone; see ``codes`` for what is written. ``remap.npy`` in it, int32
        [K], leaves out the codes that do not occur (see ``models.quantizer.build_remap``).
      source: R random-access records with ``image``, bytes or pixels.
      codec: the autoencoder.
      origin: JSON values that the codes depend on, such as ``data``, ``split`` and ``autoencoder``
        (a fingerprint). What ``crop`` and the rest of the arguments add is added here.
      crop: from images to S x S.
      num_crops: C; more than one makes sense for random crops only.
      seed: of the random crops.
      content: what is cached beside the codes.
      batch_size: B, images in one call of the codec.
      records_per_shard: work that an interruption costs at most.
      max_bad_share: share of unreadable records that stops the run; they are named in
        ``bad_records.jsonl``.
      num_threads: threads that read and decode.
      process_index, process_count: None asks JAX.

    Returns:
      The manifest, or None if other processes have not finished their shards.

    Raises:
      UserError: the folder has codes of another origin, or too many records are bad.
      OSError: the disk is full, or the folder cannot be written.
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    plan = _Plan(folder, len(source), records_per_shard)
    if content.tokenizer is not None and content.tokenizer.vocab_size > 2**16:
        raise UserError(
            f"the tokenizer has {content.tokenizer.vocab_size} ids; at most 65536 can be cached"
        )
    origin = full_origin(origin, crop, num_crops, seed, content) | {
        "records_per_shard": records_per_shard
    }
    _claim(folder, origin)
    read = CheckedReader(
        source,
        max_bad_share,
        str(folder / bad_records.FILE),
        needs_captions=content.tokenizer is not None,
    )
    encoder = _ShardEncoder(read, codec, crop, num_crops, seed, content, batch_size, num_threads)
    mine = [shard for shard in plan.missing() if shard % count == index]
    if mine:
        total = sum(len(plan.records(shard)) for shard in range(index, plan.num_shards, count))
        done = total - sum(len(plan.records(shard)) for shard in mine)
        with _bar(folder.name, total, done) as bar:
            for shard in mine:
                encoder.write(plan.records(shard), plan.path(shard), bar)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"encoded {folder}")
    if plan.missing():
        return None
    if (folder / codes.MANIFEST).exists():
        return codes.read_json(folder / codes.MANIFEST)
    return _finish(plan, origin, codec, num_crops, content)


def _bar(name: str, total: int, done: int) -> tqdm:
    return tqdm(total=total, initial=done, desc=f"encoding {name}", unit="image", mininterval=1)


def full_origin(
    origin: Mapping[str, Any], crop: Crop, num_crops: int, seed: int, content: Content
) -> dict[str, Any]:
    """What codes depend on, as ``codes.open_split`` compares it; see ``encode_split``."""
    drawn = crop.random or crop.flip
    made_with = {
        "image_size": crop.size,
        "random_crop": crop.random,
        "flip": crop.flip,
        "num_crops": num_crops,
        "crop_seed": seed if drawn else 0,
        "context_length": content.tokenizer.context_length if content.tokenizer else 0,
        "num_classes": content.num_classes,
    }
    if content.text_features:
        made_with["text_encoder"] = content.text_features.fingerprint
    return dict(origin) | made_with


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

    def missing(self) -> list[int]:
        return [s for s in range(self.num_shards) if _counts(self.path(s)) is None]


def _counts(path: Path) -> dict[str, Any] | None:
    """What was noted of a shard, or None if the shard is not there or not whole."""
    try:
        counts = codes.read_json(path.with_suffix(".json"))
    except (UserError, OSError):
        return None
    return counts if codes.is_whole(path, counts) else None


def _claim(folder: Path, origin: dict[str, Any]) -> None:
    """Writes the origin into an empty folder; refuses one with another."""
    path = folder / ORIGIN
    if path.exists():
        codes.require_origin(folder, codes.read_json(path), origin)
    else:
        (folder / bad_records.FILE).unlink(missing_ok=True)
        codes.write_json(path, origin)


class _ShardEncoder:
    """Encodes ranges of records; compiles once."""

    def __init__(self, read, codec, crop, num_crops, seed, content, batch_size, num_threads):
        self._read, self._codec, self._crop = read, codec, crop
        self._num_crops, self._seed, self._content = num_crops, seed, content
        self._batch_records = max(1, batch_size // num_crops)
        self._num_threads = num_threads
        self._truncated: dict[int, int] = {}

    def write(self, records: range, path: Path, bar: tqdm) -> None:
        """Writes a shard and its counts, both complete or not at all."""
        for remains in path.parent.glob(f".{path.stem}.*.tmp"):
            remains.unlink()
        scratch = path.with_name(f".{path.name}.tmp")
        usage = np.zeros(self._codec.num_codes, np.int64)
        counts = {"file": path.name, "records": 0, "captions": 0, "truncated": 0}
        try:
            writer = array_record_module.ArrayRecordWriter(
                str(scratch), "group_size:1,uncompressed"
            )
            for record in self._encoded(records, counts, bar):
                writer.write(record.to_bytes())
                counts["records"] += 1
                counts["captions"] += len(record.text_ids)
                counts["truncated"] += self._truncated.pop(record.id, 0)
                usage += np.bincount(record.codes.ravel(), minlength=len(usage))
            writer.close()
            with open(scratch, "rb") as file:
                os.fsync(file.fileno())
            counts["bytes"] = scratch.stat().st_size
            counts["bad"] = sorted(set(records) & self._read.bad.keys())
            # First the counts: a shard without them is not taken for one.
            codes.write_json(path.with_suffix(".json"), counts | {"usage": usage.tolist()})
            os.replace(scratch, path)
        except RuntimeError as error:  # array_record reports a full disk as this.
            raise OSError(f"{path} could not be written: {error}") from error
        finally:
            scratch.unlink(missing_ok=True)

    def _encoded(self, records: range, counts: dict, bar: tqdm) -> Iterator[CachedRecord]:
        batches = self._batches(records, bar)
        waiting = None
        # A batch is read while the one before it is encoded.
        for batch in batches:
            tokens = self._codec.encode(self._padded(batch))
            if waiting is None:
                self._measure(batch, tokens, counts)
            else:
                yield from self._cached(*waiting)
            waiting = batch, tokens
        if waiting is not None:
            yield from self._cached(*waiting)

    def _batches(self, records: range, bar: tqdm) -> Iterator[list[dict]]:
        options = grain.ReadOptions(
            num_threads=self._num_threads, prefetch_buffer_size=2 * self._batch_records
        )
        elements = grain.MapDataset.range(records.start, records.stop).map(self._crops)
        batch = []
        for record in elements.to_iter_dataset(options, allow_nones=True):
            bar.update()
            if record is not None:
                batch.append(record)
            if len(batch) == self._batch_records:
                yield batch
                batch = []
        if batch:
            yield batch

    def _crops(self, index: int) -> dict | None:
        def crops(record):
            keys = range(index * self._num_crops, (index + 1) * self._num_crops)
            crops = np.stack([self._crop(record, self._seed, key) for key in keys])
            return self._ids(record, index) | {"id": index, "crops": crops}

        return self._read(index, crops)

    def _ids(self, record: dict, index: int) -> dict:
        tokenizer, num_classes = self._content.tokenizer, self._content.num_classes
        label, ids = 0, np.zeros((0, 0), np.int32)
        if num_classes:
            label = int(record["label"])
            if not 0 <= label < num_classes:
                raise ValueError(f"label {label} is outside 0..{num_classes - 1}")
        if tokenizer is not None:
            captions = list(record["captions"])
            ids = tokenizer.encode_batch(captions, warn=False)
            lengths = [tokenizer.num_ids(caption) for caption in captions]
            self._truncated[index] = sum(n > tokenizer.context_length for n in lengths)
        return {"label": label, "text_ids": ids}

    def _padded(self, batch: list[dict]) -> np.ndarray:
        # One shape for every call, so that there is one compilation.
        missing = self._batch_records - len(batch)
        return np.concatenate([r["crops"] for r in batch] + [batch[0]["crops"]] * missing)

    def _measure(self, batch: list[dict], tokens: jax.Array, counts: dict) -> None:
        """PSNR of the shard's first batch: decoding everything would take longer than encoding."""
        size = len(batch) * self._num_crops
        images = self._padded(batch)[:size].astype(np.float64)
        decoded = np.asarray(self._codec.decode(tokens))[:size]
        error = np.square(images - decoded).mean(axis=(1, 2, 3))
        psnr = 10 * np.log10(255**2 / np.maximum(error, 1e-6))
        counts["psnr_images"], counts["psnr_sum"] = size, float(psnr.sum())

    def _cached(self, batch: list[dict], tokens: jax.Array) -> Iterator[CachedRecord]:
        tokens = np.asarray(tokens).reshape(self._batch_records, self._num_crops, -1)
        features = self._features(batch)
        for record, found in zip(batch, tokens[: len(batch)], strict=True):
            ids = record["text_ids"]
            yield CachedRecord(
                record["id"],
                record["label"],
                found.astype(np.uint16),
                ids.astype(np.uint16),
                next(features) if features else np.zeros((*ids.shape, 0), np.float16),
            )

    def _features(self, batch: list[dict]) -> Iterator[np.ndarray] | None:
        if self._content.text_features is None:
            return None
        ids = np.concatenate([record["text_ids"] for record in batch])
        found = text_features(self._content.text_features, ids, self._batch_records)
        ends = np.cumsum([len(record["text_ids"]) for record in batch])
        return iter(np.split(found, ends[:-1]))


def text_features(features: TextFeatures, ids: np.ndarray, batch_size: int) -> np.ndarray:
    """float16 [M, L, D] of ids int32 [M, L], with one shape of call."""
    made = []
    for start in range(0, len(ids), batch_size):
        part = ids[start : start + batch_size]
        padded = np.concatenate([part, part[:1].repeat(batch_size - len(part), axis=0)])
        made.append(np.asarray(features.compute(padded), np.float16)[: len(part)])
    return np.concatenate(made)


def _finish(
    plan: _Plan, origin: dict[str, Any], codec: Codec, num_crops: int, content: Content
) -> dict[str, Any]:
    """Writes what belongs to the whole split; the manifest comes last."""
    folder = plan.folder
    shards = [_counts(plan.path(shard)) for shard in range(plan.num_shards)]
    records = sum(shard["records"] for shard in shards)
    bad = sum(len(shard["bad"]) for shard in shards)
    if not records:
        raise UserError(f"nothing could be encoded into {folder}: {bad} records are bad")
    usage = np.sum([shard.pop("usage") for shard in shards], axis=0)
    share = usage[usage > 0] / usage.sum()
    psnr_images = sum(shard.get("psnr_images", 0) for shard in shards)
    psnr = sum(shard.get("psnr_sum", 0.0) for shard in shards) / psnr_images
    features, tokenizer = content.text_features, content.tokenizer
    empty = tokenizer.encode_batch([""]) if tokenizer else np.zeros((1, 0), np.int32)
    if features is not None:
        _save_array(folder / codes.NULL_FEATURES, text_features(features, empty, 1)[0])
    _save_array(folder / REMAP, quantizer.build_remap(usage))
    manifest = {
        "format": codes.FORMAT,
        "origin": origin,
        "layout": {
            "num_tokens": codec.num_tokens,
            "num_crops": num_crops,
            "context_length": tokenizer.context_length if tokenizer else 0,
            "feature_width": features.width if features else 0,
            "null_text_ids": empty[0].tolist(),
            "num_classes": content.num_classes,
        },
        "records": records,
        "bad_records": bad,
        "captions": sum(shard["captions"] for shard in shards),
        "captions_truncated": sum(shard["truncated"] for shard in shards),
        "num_codes": codec.num_codes,
        "codes_used": int((usage > 0).sum()),
        "perplexity": float(np.exp(-np.sum(share * np.log(share)))),
        "psnr": psnr,
        "psnr_images": psnr_images,
        "shards": [{key: shard[key] for key in ("file", "records", "bytes")} for shard in shards],
    }
    codes.write_json(folder / codes.MANIFEST, manifest)
    logging.info(
        "%s: %d records (%d bad ones left out), %d of %d captions cut to fit; %d of %d codes in "
        "use, perplexity %.1f; PSNR %.2f dB of %d reconstructions",
        folder, records, bad, manifest["captions_truncated"], manifest["captions"],
        manifest["codes_used"], codec.num_codes, manifest["perplexity"],
        psnr, psnr_images,
    )  # fmt: skip
    return manifest


def _save_array(path: Path, array: np.ndarray) -> None:
    with codes.appearing(path) as file:
        np.save(file, array)
