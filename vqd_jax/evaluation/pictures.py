"""Sets of pictures that an evaluation reads, and their features, which are kept in files.

Pictures are read and forgotten, a block at a time: memory does not grow with their number. The
features of a block are written as soon as they are known, so that an evaluation that was killed
goes on with the next block.

Letters: N pictures, B block, S image side, D features.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from vqd_jax import files
from vqd_jax.data import images
from vqd_jax.data.batches import Crop
from vqd_jax.errors import UserError
from vqd_jax.evaluation.features import FeatureNet
from vqd_jax.parallel import processes, rows

# Pictures in a file of features, and in a call of a network on each device.
BLOCK = 512
BATCH_PER_DEVICE = 32
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# What metadata.jsonl may call a prompt.
_PROMPT_KEYS = ("prompt", "text", "caption")


class Pictures(Protocol):
    """N pictures of one size.

    Attributes:
      identity: JSON values that decide them.
    """

    identity: dict[str, Any]

    def __len__(self) -> int: ...

    def read(self, places: Sequence[int]) -> np.ndarray:
        """uint8 [B, S, S, 3]."""


class RealPictures:
    """Pictures of a data set, cut and resized as the autoencoder sees them in evaluation.

    Args:
      records: of a split; see ``batches.records``, without decoding.
      places: of the pictures in it, int64 [N].
      size: S.
      source: what decides the records; see ``sets.source_fingerprint``.

    Attributes:
      places: as given.
    """

    def __init__(self, records: Sequence[dict], places: np.ndarray, size: int, source: str):
        self._records, self.places, self._crop = records, places, Crop(size)
        self._source = source
        digest = hashlib.sha256(np.asarray(places, np.int64).tobytes()).hexdigest()
        self.identity = {"source": source, "places": digest, "image_size": size}

    def __len__(self):
        return len(self.places)

    def first(self, count: int) -> "RealPictures":
        """The first ``count`` of them."""
        return RealPictures(self._records, self.places[:count], self._crop.size, self._source)

    def text(self, place: int) -> str:
        """The first caption of a picture, or its label."""
        record = self._records[int(self.places[place])]
        return record["captions"][0] if "captions" in record else str(int(record["label"]))

    def read(self, places):
        """Pictures by their places in the list."""
        return np.stack([self._crop(self._records[int(self.places[i])], 0, 0) for i in places])


class FolderPictures:
    """The pictures in a folder.

    Args:
      directory: with picture files, and maybe ``metadata.jsonl``: an object a line with
        ``file_name`` and ``prompt``, ``text`` or ``caption``.
      size: S, which they must have.
      identity: what decides them; None is their content.
      count: how many are taken, by name; None is all.

    Attributes:
      prompts: N texts, or None if the folder does not tell them.

    Raises:
      UserError: the folder has no picture, or a file cannot be read or has another size.
    """

    def __init__(
        self,
        directory: str | Path,
        size: int,
        identity: dict[str, Any] | None = None,
        count: int | None = None,
    ):
        folder, self._size = Path(directory), size
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder of pictures")
        # A hidden file is no picture: a program that was killed may have left a part of one.
        visible = (p for p in folder.iterdir() if not p.name.startswith("."))
        found = sorted(p for p in visible if p.suffix.lower() in _SUFFIXES)
        self._paths = found[:count]
        if not found:
            raise UserError(f"{folder} has no picture ({', '.join(sorted(_SUFFIXES))})")
        # Before hours of work on the real pictures, and not after them.
        self.read([0])
        self.prompts = self._metadata(folder / "metadata.jsonl")
        self.identity = {"content": self._content()} if identity is None else identity

    def _metadata(self, path: Path) -> list[str] | None:
        if not path.exists():
            return None
        told = {}
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
            try:
                row = json.loads(line) if line.strip() else {}
                if row:
                    key = next(key for key in _PROMPT_KEYS if key in row)
                    told[row["file_name"]] = str(row[key])
            except (ValueError, KeyError, StopIteration, AttributeError, TypeError) as error:
                raise UserError(
                    f"{path}:{number}: must be an object with file_name and one of "
                    f"{', '.join(_PROMPT_KEYS)}"
                ) from error
        lacking = [p.name for p in self._paths if p.name not in told]
        if lacking:
            raise UserError(f"{path} says nothing of {lacking[0]}")
        return [told[path.name] for path in self._paths]

    def _content(self) -> str:
        digest = hashlib.sha256()
        for path in self._paths:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def __len__(self):
        return len(self._paths)

    def read(self, places):
        """Pictures by their places in the list."""
        return np.stack([self._one(self._paths[i]) for i in places])

    def _one(self, path):
        pixels = np.asarray(images.load(path))
        if pixels.shape[:2] != (self._size, self._size):
            height, width = pixels.shape[:2]
            raise UserError(
                f"{path} has {width} x {height} pixels; the real pictures have {self._size} x "
                f"{self._size} (config.data.image_size): make them of one size"
            )
        return pixels


class Decoded:
    """Pictures after a function, such as a pass through the autoencoder.

    Args:
      pictures: the pictures before.
      function: uint8 [B, S, S, 3] -> uint8 [B, S, S, 3].
      identity: what decides the function.
    """

    def __init__(self, pictures: Pictures, function, identity: dict[str, Any]):
        self._pictures, self._function = pictures, function
        self.identity = {"of": pictures.identity, **identity}

    def __len__(self):
        return len(self._pictures)

    def read(self, places):
        """Pictures by their places in the list."""
        return self._function(self._pictures.read(places))


class Stored:
    """Features in files, float32 [N, D]; iterating gives them a block at a time."""

    def __init__(self, paths: list[Path], width: int, count: int):
        self._paths, self.width, self._count = paths, width, count

    def __len__(self):
        return self._count

    def __iter__(self) -> Iterator[np.ndarray]:
        for path in self._paths:
            yield np.load(path)

    def take(self, places: Sequence[int]) -> np.ndarray:
        """The rows at these places, which must rise."""
        places, start, found = np.asarray(places), 0, []
        for path in self._paths:
            block = np.load(path, mmap_mode="r")
            inside = places[(places >= start) & (places < start + len(block))] - start
            found.append(np.asarray(block[inside]))
            start += len(block)
        return np.concatenate(found)

    def all(self) -> np.ndarray:
        """All rows."""
        return np.concatenate(list(self))


class Extractor:
    """The features of a network, on all devices of this process.

    Args:
      net: the network.
      cache: folder of the files of features.
    """

    def __init__(self, net: FeatureNet, cache: str | Path):
        self.net, self._cache = net, Path(cache)
        devices = jax.local_devices()
        mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
        self._rows = NamedSharding(mesh, PartitionSpec("data"))
        self._params = jax.device_put(net.params, NamedSharding(mesh, PartitionSpec()))
        self._apply = jax.jit(net.apply)
        self._batch_size = BATCH_PER_DEVICE * len(devices)

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """Pictures uint8 [N, S, S, 3] -> float32 [N, D]."""

        def run(part):
            return self._apply(self._params, jax.device_put(part, self._rows))

        return rows.in_batches(run, pixels, self._batch_size)

    def stored(self, pictures: Pictures, description: str) -> Stored:
        """The features of pictures; those that are in files are not computed again.

        Several processes share the blocks.
        """
        named = {"pictures": pictures.identity, "net": self.net.name, "weights": self.net.sha256}
        folder = self._cache / files.fingerprint({"": json.dumps(named, sort_keys=True)})[:24]
        folder.mkdir(parents=True, exist_ok=True)
        count = len(pictures)
        blocks = [(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
        paths = [folder / f"{start:08d}-{stop:08d}.npy" for start, stop in blocks]
        missing = [
            (block, path) for block, path in zip(blocks, paths, strict=True) if not path.exists()
        ]
        processes.wait_for_all(f"features of {folder.name} listed")
        mine = missing[jax.process_index() :: jax.process_count()]
        total = sum(stop - start for (start, stop), _ in mine)
        about = f"{self.net.name}, {description}"
        with tqdm(total=total, desc=about, unit="image", mininterval=1, disable=not mine) as bar:
            for (start, stop), path in mine:
                found = self.features(pictures.read(range(start, stop)))
                with files.appearing(path) as scratch:
                    np.save(scratch, found)
                bar.update(stop - start)
        processes.wait_for_all(f"features of {folder.name} written")
        return Stored(paths, self.net.width, count)
