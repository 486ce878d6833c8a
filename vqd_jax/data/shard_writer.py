"""A range of records -> one shard of cached codes: read, crop, tokenise, encode, count, write.

Letters: C crops of an image, B batch, S image side, N image tokens, n captions of a record, L text
tokens, D width of text features.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from array_record.python import array_record_module
from tqdm import tqdm

from vqd_jax import files
from vqd_jax.data import codes
from vqd_jax.data.codes import CachedRecord
from vqd_jax.data.text import ClipTokenizer, TextFeatures
from vqd_jax.errors import UserError
from vqd_jax.parallel import rows

# Threads that read and decode.
NUM_THREADS = 4


class Content(NamedTuple):
    """What is cached of a record beside the codes of its crops.

    Attributes:
      tokenizer: of the records' ``captions``; None leaves captions out.
      text_features: of the captions; None leaves them out.
      num_classes: of the records' ``label``; 0 leaves labels out.
    """

    tokenizer: ClipTokenizer | None = None
    text_features: TextFeatures | None = None
    num_classes: int = 0

    def origin(self) -> dict[str, Any]:
        """What decides it, as JSON values."""
        decides = {
            "context_length": self.tokenizer.context_length if self.tokenizer else 0,
            "num_classes": self.num_classes,
        }
        if self.text_features is not None:
            decides["text_encoder"] = self.text_features.fingerprint
        return decides

    def null(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The empty caption: ids int32 [L] and, if they are cached, features float16 [L, D]."""
        if self.tokenizer is None:
            return np.zeros(0, np.int32), None
        ids = self.tokenizer.encode_batch([""])
        return ids[0], None if self.text_features is None else self.features(ids, 1)[0]

    def features(self, ids: np.ndarray, batch_size: int) -> np.ndarray:
        """float16 [M, L, D] of ids int32 [M, L], in calls of one shape."""
        return rows.in_batches(self.text_features.compute, ids, batch_size).astype(np.float16)

    def of(self, record: dict) -> dict[str, Any]:
        """``label``, ``text_ids`` int32 [n, L], and ``truncated``, the captions that were cut.

        Raises:
          ValueError: the label is none of the classes.
        """
        label, ids, truncated = 0, np.zeros((0, 0), np.int32), 0
        if self.num_classes:
            label = int(record["label"])
            if not 0 <= label < self.num_classes:
                raise ValueError(f"label {label} is outside 0..{self.num_classes - 1}")
        if self.tokenizer is not None:
            captions = list(record["captions"])
            ids = self.tokenizer.encode_batch(captions, warn=False)
            lengths = [self.tokenizer.num_ids(caption) for caption in captions]
            truncated = sum(n > self.tokenizer.context_length for n in lengths)
        return {"label": label, "text_ids": ids, "truncated": truncated}


def counts_of(path: Path) -> dict[str, Any] | None:
    """What was counted of a shard; None if the shard is not there or not whole."""
    try:
        counts = files.read_json(path.with_suffix(".json"), codes.REMEDY)
    except (UserError, FileNotFoundError):
        return None
    return counts if codes.is_whole(path, counts) else None


class ShardWriter:
    """Encodes ranges of records; compiles once.

    Args:
      read: a ``CheckedReader`` of the records.
      codec, crop, num_crops, seed, content, batch_size: see ``encode.encode_split``.
    """

    def __init__(self, read, codec, crop, num_crops, seed, content, batch_size):
        if content.tokenizer is not None and content.tokenizer.vocab_size > 2**16:
            raise UserError(
                f"the tokenizer has {content.tokenizer.vocab_size} ids; at most 65536 can be cached"
            )
        self._read, self._codec, self._crop = read, codec, crop
        self._num_crops, self._seed, self._content = num_crops, seed, content
        self._batch_records = max(1, batch_size // num_crops)

    def write(self, records: range, path: Path, bar: tqdm) -> None:
        """Writes a shard and its counts, both whole or not at all. Hold a lock on the shard."""
        usage = np.zeros(self._codec.num_codes, np.int64)
        counts = {"file": path.name, "records": 0, "captions": 0, "truncated": 0}
        for target in (path, path.with_suffix(".json")):
            files.remove_remains(target)
        try:
            with files.appearing(path) as scratch:
                writer = array_record_module.ArrayRecordWriter(
                    str(scratch), "group_size:1,uncompressed"
                )
                for record in self._encoded(records, counts, bar):
                    writer.write(record.to_bytes())
                    counts["records"] += 1
                    counts["captions"] += len(record.text_ids)
                    usage += np.bincount(record.codes.ravel(), minlength=len(usage))
                writer.close()
                counts["bytes"] = scratch.stat().st_size
                counts["bad"] = sorted(set(records) & self._read.bad.keys())
                counts["usage"] = usage.tolist()
                # The counts come first: a shard without them is not taken for one.
                files.write_json(path.with_suffix(".json"), counts)
        except RuntimeError as error:  # array_record reports a full disk as this.
            raise OSError(f"{path} could not be written: {error}") from error

    def _encoded(self, records: range, counts: dict, bar: tqdm) -> Iterator[CachedRecord]:
        waiting = None
        # A batch is read while the one before it is encoded.
        for batch in self._batches(records, bar):
            counts["truncated"] += sum(record["truncated"] for record in batch)
            crops = np.concatenate([record["crops"] for record in batch])
            size = self._batch_records * self._num_crops
            tokens = self._codec.encode(rows.padded(crops, size))
            if waiting is None:
                counts |= self._quality(crops, tokens)
            else:
                yield from self._cached(*waiting)
            waiting = batch, tokens
        if waiting is not None:
            yield from self._cached(*waiting)

    def _batches(self, records: range, bar: tqdm) -> Iterator[list[dict]]:
        options = grain.ReadOptions(NUM_THREADS, prefetch_buffer_size=2 * self._batch_records)
        elements = grain.MapDataset.range(records.start, records.stop).map(self._element)
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

    def _element(self, index: int) -> dict | None:
        def element(record):
            keys = range(index * self._num_crops, (index + 1) * self._num_crops)
            crops = np.stack([self._crop(record, self._seed, key) for key in keys])
            return self._content.of(record) | {"id": index, "crops": crops}

        return self._read(index, element)

    def _quality(self, images: np.ndarray, tokens: jax.Array) -> dict[str, Any]:
        """PSNR of the shard's first batch: decoding everything would take longer than encoding."""
        decoded = np.asarray(self._codec.decode(tokens))[: len(images)]
        error = np.square(images.astype(np.float64) - decoded).mean(axis=(1, 2, 3))
        psnr = 10 * np.log10(255**2 / np.maximum(error, 1e-6))
        return {"psnr_images": len(images), "psnr_sum": float(psnr.sum())}

    def _cached(self, batch: list[dict], tokens: jax.Array) -> Iterator[CachedRecord]:
        tokens = np.asarray(tokens).reshape(self._batch_records, self._num_crops, -1)
        features = [np.zeros((*record["text_ids"].shape, 0), np.float16) for record in batch]
        if self._content.text_features is not None:
            ids = np.concatenate([record["text_ids"] for record in batch])
            ends = np.cumsum([len(record["text_ids"]) for record in batch])
            features = np.split(self._content.features(ids, self._batch_records), ends[:-1])
        for record, found, of_text in zip(batch, tokens, features, strict=False):
            ids = record["text_ids"].astype(np.uint16)
            yield CachedRecord(record["id"], record["label"], found.astype(np.uint16), ids, of_text)
