"""The cache of codes: what stage two trains on, read at random from disk.

Letters: R records, C crops of an image, N image tokens, n captions of a record, L text tokens,
D width of text features.

A cached split is a folder: ``manifest.json``, and shards ``codes-00000-of-00010.array_record``,
each with a ``.json`` of its counts. A record is a row of little-endian 16-bit words::

    number of the record in its data set   4 words
    n                                      1 word
    label                                  1 word, 0 where there are no labels
    codes                                  C N words, uint16
    text ids                               n L words, uint16
    text features                          n L D words, float16, where they are cached
"""

import collections
import functools
import resource
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

from vqd_jax import files
from vqd_jax.data import bad_records
from vqd_jax.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
NULL_FEATURES = "null_text_features.npy"
# What to do about a damaged file of a cache.
REMEDY = "remove it and run --mode=encode again"
_HEADER = 6
# Without read-ahead and threads a random read takes a tenth of the time.
_READ_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class CachedRecord(NamedTuple):
    """One record of a cache.

    Attributes:
      id: its number in the data set.
      label: int, 0 where there are no labels.
      codes: uint16 [C, N].
      text_ids: uint16 [n, L].
      text_features: float16 [n, L, D]; D is 0 where they are not cached.
    """

    id: int
    label: int
    codes: np.ndarray
    text_ids: np.ndarray
    text_features: np.ndarray

    def to_bytes(self) -> bytes:
        """The row of words that a shard stores."""
        number = np.array([self.id], "<u8").view("<u2")
        counts = np.array([len(self.text_ids), self.label], "<u2")
        parts = [number, counts, self.codes, self.text_ids]
        words = [np.ascontiguousarray(part, "<u2").ravel() for part in parts]
        features = np.ascontiguousarray(self.text_features, "<f2").ravel().view("<u2")
        return np.concatenate([*words, features]).tobytes()


def require_origin(path: Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuses a cache that was made from something else.

    Args:
      path: folder of the cache.
      stored: what its codes depend on.
      expected: what this run needs; keys that are left out may be anything.

    Raises:
      UserError: they differ; the message has every key with both values.
    """
    differing = [key for key, value in expected.items() if stored.get(key) != value]
    if not differing:
        return
    told = "; ".join(f"{key} is {stored.get(key)}, not {expected[key]}" for key in differing)
    by = " by another autoencoder" if "autoencoder" in differing else " from something else"
    raise UserError(
        f"the codes in {path} were made{by} ({told}). Use the autoencoder and settings that they "
        "were made with, or encode again into another folder with --mode=encode"
    )


def open_split(path: str, expected_origin: Mapping[str, Any] | None = None) -> "CodesSource":
    """Opens a cached split for training.

    Args:
      path: folder that ``encode.encode_split`` wrote.
      expected_origin: see ``require_origin``; None takes any.

    Raises:
      UserError: it is missing, unfinished, damaged, or made from something else.
    """
    folder = Path(path)
    if not (folder / MANIFEST).exists():
        what = "is not finished" if any(folder.glob("codes-*")) else "has no cached codes"
        raise UserError(f"{folder} {what} (no {MANIFEST}); run --mode=encode")
    manifest = files.read_json(folder / MANIFEST, REMEDY)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder} has format {manifest.get('format')}, this program reads {FORMAT}; "
            "encode again with --mode=encode"
        )
    require_origin(folder, manifest["origin"], expected_origin or {})
    for shard in manifest["shards"]:
        if not is_whole(folder / shard["file"], shard):
            raise UserError(
                f"{folder / shard['file']} is missing or damaged; run --mode=encode again, which "
                "makes this shard anew and keeps the others"
            )
    return CodesSource(folder, manifest)


def is_whole(path: Path, shard: Mapping[str, Any]) -> bool:
    """Whether a shard has the size that its counts say."""
    return path.exists() and path.stat().st_size == shard["bytes"]


class CodesSource:
    """Random access to the records of a cached split; a read reads nothing else.

    Args:
      folder: of the split.
      manifest: what its ``manifest.json`` holds.

    Attributes:
      null: the conditions that its records have, by name, and what stands for none: ``text_ids``
        int32 [L], ``text_features`` float16 [L, D], ``label`` int32 [].
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        self.folder = folder
        self.manifest = manifest
        layout = manifest["layout"]
        self.num_tokens: int = layout["num_tokens"]
        self.num_crops: int = layout["num_crops"]
        self.context_length: int = layout["context_length"]
        self.feature_width: int = layout["feature_width"]
        self.num_classes: int = layout["num_classes"]
        self._paths = [folder / shard["file"] for shard in manifest["shards"]]
        self._ends = np.cumsum([shard["records"] for shard in manifest["shards"]])
        self.null: dict[str, np.ndarray] = {}
        if self.context_length:
            self.null["text_ids"] = np.array(layout["null_text_ids"], np.int32)
        if self.feature_width:
            self.null["text_features"] = np.load(folder / NULL_FEATURES)
        if self.num_classes:
            self.null["label"] = np.array(self.num_classes, np.int32)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, rows: np.ndarray) -> list[CachedRecord]:
        """Records by row.

        Args:
          rows: integers [B], 0 <= row < R.

        Raises:
          UserError: a shard cannot be read.
        """
        return [self._parse(stored) for stored in self._stored(rows)]

    def take(
        self, rows: np.ndarray, crop: np.ndarray, caption: np.ndarray
    ) -> dict[str, np.ndarray]:
        """One crop and one caption of each record, as arrays; faster than ``read``.

        Args:
          rows: integers [B], 0 <= row < R.
          crop, caption: numbers [B] in [0, 1) that choose among what a record has.

        Returns:
          ``id``, ``label``, ``crop`` and ``caption`` (the chosen ones), integers [B]; ``codes``
          uint16 [B, N]; where there are captions, ``text_ids`` uint16 [B, L] and, where they are
          cached, ``text_features`` float16 [B, L, D].

        Raises:
          UserError: a shard cannot be read.
        """
        stored = self._stored(rows)
        words = np.frombuffer(b"".join(stored), "<u2")
        ends = np.cumsum([len(record) // 2 for record in stored])
        starts = np.concatenate([[0], ends[:-1]])

        def cut(first, length):
            return np.lib.stride_tricks.sliding_window_view(words, length)[first]

        header = cut(starts, _HEADER)
        counts = header[:, 4].astype(np.int64)
        crop = (crop * self.num_crops).astype(np.int64)
        caption = (caption * counts).astype(np.int64)
        found = {
            "id": np.ascontiguousarray(header[:, :4]).view("<u8")[:, 0].astype(np.int64),
            "label": header[:, 5],
            "crop": crop,
            "caption": caption,
            "codes": cut(starts + _HEADER + crop * self.num_tokens, self.num_tokens),
        }
        length, size = self.context_length, self.context_length * self.feature_width
        text = starts + _HEADER + self.num_crops * self.num_tokens
        if length:
            found["text_ids"] = cut(text + caption * length, length)
        if size:
            features = cut(text + counts * length + caption * size, size).view("<f2")
            found["text_features"] = features.reshape(-1, length, self.feature_width)
        return found

    def _stored(self, rows: np.ndarray) -> list[bytes]:
        shards = np.searchsorted(self._ends, rows, side="right")
        places = rows - np.concatenate([[0], self._ends])[shards]
        found = []
        # One by one: reading two records together takes longer than reading one after the other.
        for shard, place in zip(shards.tolist(), places.tolist(), strict=True):
            read = functools.partial(_READERS.read, self._paths[shard], place)
            try:
                found.append(bad_records.read_stored(read))
            except (RuntimeError, ValueError, IndexError) as error:
                name = self.manifest["shards"][shard]["file"]
                raise UserError(
                    f"{self.folder / name} is damaged ({error}); {REMEDY}, which makes it anew"
                ) from error
        return found

    def _parse(self, stored: bytes) -> CachedRecord:
        words = np.frombuffer(stored, "<u2")
        count, label = int(words[4]), int(words[5])
        length, width = self.context_length, self.feature_width
        text = _HEADER + self.num_crops * self.num_tokens
        features = text + count * length
        return CachedRecord(
            int.from_bytes(stored[:8], "little"),
            label,
            words[_HEADER:text].reshape(self.num_crops, self.num_tokens),
            words[text:features].reshape(count, length),
            words[features:].view("<f2").reshape(count, length, width),
        )

    def __iter__(self) -> Iterator[CachedRecord]:
        for start in range(0, len(self), 1024):
            yield from self.read(np.arange(start, min(start + 1024, len(self))))

    def require_same_layout(self, other: "CodesSource") -> None:
        """Raises ``UserError`` if the records of two caches cannot stand in one batch."""
        names = ("num_tokens", "context_length", "feature_width", "num_classes")
        differing = [name for name in names if getattr(self, name) != getattr(other, name)]
        mine, theirs = (s.manifest["origin"].get("autoencoder") for s in (self, other))
        if mine != theirs:
            differing.append("autoencoder")
        if differing:
            raise UserError(
                f"{self.folder} and {other.folder} cannot be mixed: they differ in "
                f"{', '.join(differing)}"
            )


class _Readers:
    """Open shards, as many as the system allows to be open; the one unused for longest is closed.

    A process may open 1,024 files on many systems, and all caches of a run share that.
    """

    # Of the files that may be open, for the rest of the program.
    _SHARE = 0.5

    def __init__(self):
        self._open: collections.OrderedDict[Path, array_record_module.ArrayRecordReader]
        self._open = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, place: int) -> bytes:
        """A record of a shard.

        Raises:
          RuntimeError, ValueError, IndexError: the shard is damaged.
        """
        # A reader must not be closed while another thread reads.
        with self._lock:
            reader = self._open.pop(path, None) or array_record_module.ArrayRecordReader(
                str(path), options=_READ_OPTIONS, file_reader_buffer_size=32768
            )
            self._open[path] = reader
            if len(self._open) > self._most():
                self._open.popitem(last=False)[1].close()
            try:
                return reader.read([place])[0]
            except Exception:
                # Another attempt opens it again, which helps after "Stale file handle".
                self._open.pop(path).close()
                raise

    def _most(self) -> int:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return 2**16 if limit == resource.RLIM_INFINITY else max(8, int(limit * self._SHARE))


_READERS = _Readers()
