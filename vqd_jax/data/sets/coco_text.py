"""COCO 2014 with captions: the publisher's folders or zips, or TFDS's prepared `coco_captions`."""

import json
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from array_record.python import array_record_module
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from vqd_jax.data.sets.file_set import Bad, FileSet, Item, Record, clean
from vqd_jax.data.sets.tree import Tree, canonical
from vqd_jax.errors import UserError

_PHASES = {"train": "train", "validation": "val"}
_ANNOTATION_ZIP = "annotations_trainval2014.zip"
_SHARD = re.compile(r"(?:^|/)coco_captions-(\w+)\.(?:tfrecord|array_record)-\d+-of-\d+$")


class CocoText(FileSet):
    """TFDS builder `coco_text`; see `FileSet` for the features."""

    HOMEPAGE = "https://cocodataset.org"
    LICENSE = (
        "Annotations: Creative Commons Attribution 4.0, (c) COCO Consortium. Images: Flickr terms "
        "of use; the licence of each image is named in the annotation files."
    )
    ZIPS = (_ANNOTATION_ZIP, "train2014.zip", "val2014.zip")

    @classmethod
    def facts(cls, tree: Tree, config: str) -> dict[str, str]:
        if shards := _shards(tree):
            return {"coco_captions": tree.listing_fact(shards, sizes=True)}
        facts = {}
        for phase in _PHASES.values():
            name = tree.first("COCO captions", _annotations(phase))
            facts[name] = tree.content_fact(name)
            folder = _images(tree, phase)
            facts[folder] = tree.listing_fact(tree.files(folder, recursive=False))
        return facts

    def items(self) -> dict[str, Sequence[Item | str]]:
        shards = _shards(self._tree)
        if shards:
            # `coco_captions` has the publisher's validation images in three splits.
            train = [s for s in shards if _SHARD.search(s)[1] == "train"]
            return {"train": train, "validation": [s for s in shards if s not in train]}
        return {split: _read_phase(self._tree, phase) for split, phase in _PHASES.items()}

    def listing(self) -> list[str]:
        tree = self._tree
        if _shards(tree):
            return []
        folders = [_images(tree, phase) for phase in _PHASES.values()]
        return [name for folder in folders for name in tree.files(folder, recursive=False)]

    @staticmethod
    def read_archive(tree: Tree, name: str) -> Iterator[Record | Bad]:
        path = str(tree.path(name))
        examples = _array_records(path) if ".array_record-" in name else _tf_records(path)
        for number, example in enumerate(examples):
            if isinstance(example, Bad):
                yield example
            else:
                yield _record(example, f"{name}#{number}")


def _annotations(phase: str) -> str:
    return f"annotations/captions_{phase}2014.json"


def _images(tree: Tree, phase: str) -> str:
    folder = f"{phase}2014"
    # The published VQ-Diffusion unzips into a folder of the same name, which adds a level.
    return tree.first("COCO images", f"{folder}/{folder}", folder, f"images/{folder}")


def _shards(tree: Tree) -> list[str]:
    """Shards of a prepared `coco_captions`; [] if the publisher's files are there."""
    if tree.has(_annotations("train")):
        return []
    places = ("", "coco_captions/2014/1.1.0")
    for place in places:
        if shards := [s for s in tree.files(place, recursive=False) if _SHARD.search(s)]:
            return shards
    return []


def _read_phase(tree: Tree, phase: str) -> list[Item]:
    """An item for each picture with its captions, and for each row that cannot be used."""
    name = _annotations(phase)
    try:
        content = json.loads(tree.required_text(name))
        images, rows = list(content["images"]), list(content["annotations"])
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(
            f"{tree.root / name} is not a COCO caption file, or cut short: "
            f"{type(error).__name__}: {error}"
        ) from error
    names, problems = {}, []
    for number, image in enumerate(images):
        try:
            key, file = _whole_number(image, "id"), _text(image, "file_name")
            if key in names:
                raise ValueError("an earlier one has the same id")
            names[key] = file
        except ValueError as error:
            problems.append(Item(f"{name}#images[{number}]", problem=str(error)))
    captions = {image: [] for image in names}
    for number, row in enumerate(rows):
        place = f"{name}#annotations[{number}]"
        try:
            key = _whole_number(row, "id")
            place = f"{name}#{key}"
            image = _whole_number(row, "image_id")
            if image not in captions:
                raise ValueError(f"image id {image} is not in the list of images")
            captions[image].append((key, _text(row, "caption")))
        except ValueError as error:
            problems.append(Item(place, problem=str(error)))
    told = sum(map(len, captions.values())) + len(names) + len(problems)
    if len(images) + len(rows) != told:
        raise RuntimeError(f"{name}: its rows do not add up: a fault of this program")
    folder = _images(tree, phase)
    # A picture with two ids, or with two spellings of its name, is one record.
    pictures: dict[str, tuple[str, list]] = {}
    for i, found in captions.items():
        pictures.setdefault(canonical(names[i]), (names[i], []))[1].extend(found)
    items = [
        Item(f"{folder}/{name}", tuple(text for _, text in sorted(found, key=lambda x: x[0])))
        for name, found in pictures.values()
    ]
    return items + problems


def _whole_number(row: Any, key: str) -> int:
    value = _field(row, key)
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}, not a whole number")
    return value


def _text(row: Any, key: str) -> str:
    value = _field(row, key)
    if not isinstance(value, str):
        raise ValueError(
            f"{key} is {'null' if value is None else type(value).__name__}, not a text"
        )
    if not value.strip():
        raise ValueError(f"empty {key}")
    return value


def _field(row: Any, key: str) -> Any:
    if not isinstance(row, dict) or key not in row:
        raise ValueError(f"no {key!r}")
    return row[key]


def _record(serialized: bytes, place: str) -> Record | Bad:
    """The record of an example of `coco_captions`."""
    try:
        feature = tf_example_pb2.Example.FromString(serialized).features.feature
        file = feature["image/filename"].bytes_list.value[0].decode()
        ids = feature["captions/id"].int64_list.value
        texts = feature["captions/text"].bytes_list.value
        in_order = sorted(zip(ids, texts, strict=True), key=lambda pair: pair[0])
        captions = clean(text.decode() for _, text in in_order)
        # "COCO_train2014_000000000009.jpg" lies in "train2014".
        folder = file.split("_")[1]
        return Record(f"{folder}/{file}", feature["image"].bytes_list.value[0], captions)
    except (DecodeError, ValueError, IndexError) as error:
        return Bad(place, f"not an example of coco_captions: {type(error).__name__}: {error}")


def _array_records(path: str) -> Iterator[bytes]:
    reader = array_record_module.ArrayRecordReader(path)
    for i in range(reader.num_records()):
        yield reader.read([i])[0]


def _tf_records(path: str) -> Iterator[bytes]:
    """The records of a TFRecord file, each as length, checksum, data, checksum; little-endian."""
    with open(path, "rb") as file:
        while header := file.read(12):
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else 0
            data = file.read(length + 4)
            if len(header) < 12 or len(data) < length + 4:
                raise UserError(f"{path} is cut short; prepare or copy it again")
            yield data[:length]
