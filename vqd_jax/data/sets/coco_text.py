"""COCO 2014 with captions: the publisher's folders or zips, or TFDS's prepared `coco_captions`."""

import json
import re
import struct
from collections.abc import Iterator, Sequence

from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from vqd_jax.data.sets.file_set import FileSet, Item, Record, clean
from vqd_jax.data.sets.tree import Tree
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

    @staticmethod
    def read_archive(tree: Tree, name: str) -> Iterator[Record]:
        path = str(tree.path(name))
        examples = _array_records(path) if ".array_record-" in name else _tf_records(path)
        return map(_record, examples)


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
        if shards := [s for s in _files(tree, place) if _SHARD.search(s)]:
            return shards
    return []


def _files(tree: Tree, folder: str) -> list[str]:
    return tree.files(folder, recursive=False) if not folder or tree.has(folder) else []


def _read_phase(tree: Tree, phase: str) -> list[Item]:
    name = _annotations(phase)
    try:
        content = json.loads(tree.required_text(name))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        rows = sorted(content["annotations"], key=lambda row: row["id"])
        captions = {image: [] for image in names}
        problems = []
        for row in rows:
            if row["image_id"] not in captions:
                reason = f"image id {row['image_id']} is not in the list of images"
                problems.append(Item(f"{name}#{row['id']}", problem=reason))
            elif not row["caption"].strip():
                problems.append(Item(f"{name}#{row['id']}", problem="empty caption"))
            else:
                captions[row["image_id"]].append(row["caption"])
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{tree.root / name} is not a COCO caption file, or cut short: "
            f"{type(error).__name__}: {error}"
        ) from error
    folder = _images(tree, phase)
    items = [Item(f"{folder}/{names[i]}", tuple(texts)) for i, texts in captions.items()]
    return items + problems


def _record(serialized: bytes) -> Record:
    """The record of an example of `coco_captions`."""
    feature = tf_example_pb2.Example.FromString(serialized).features.feature
    file = feature["image/filename"].bytes_list.value[0].decode()
    ids = feature["captions/id"].int64_list.value
    texts = feature["captions/text"].bytes_list.value
    in_order = sorted(zip(ids, texts, strict=True), key=lambda pair: pair[0])
    captions = clean(text.decode() for _, text in in_order)
    # "COCO_train2014_000000000009.jpg" lies in "train2014".
    folder = file.split("_")[1]
    return Record(f"{folder}/{file}", feature["image"].bytes_list.value[0], captions)


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
