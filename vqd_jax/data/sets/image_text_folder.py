"""A folder of the user's own images and texts, in one of three layouts.

* Hugging Face imagefolder: `metadata.jsonl` or `metadata.csv` with `file_name` and `text` (or
  `caption`, `captions`), beside the images or beside the folders that hold them.
* Pairs: `name.jpg` and `name.txt`, which has a caption on each line.
* Tars of img2dataset or webdataset, which are streamed: samples of `key.jpg` and `key.txt`, or
  `key.json` with `caption`.

The folders `train`, `validation` (`val`, `valid`, `dev`) and `test` at the top are the splits.
Without them, every 20th image or tar is for validation.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence

import tensorflow_datasets as tfds

from vqd_jax.data.sets.file_set import Bad, FileSet, Item, Record, clean, hold_out
from vqd_jax.data.sets.tree import Tree, decode_text
from vqd_jax.errors import UserError

_SPLITS = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_METADATA = ("metadata.jsonl", "metadata.csv")
_CAPTION_KEYS = ("text", "caption", "captions")


class ImageTextFolder(FileSet):
    """TFDS builder `image_text_folder`; see `FileSet` for the features."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=self._features(),
            # The name of a prepared folder is a hash, so this says where it comes from.
            description=f"Images with texts from {self._tree.root}.",
            license="That of the user's own files.",
        )

    @classmethod
    def facts(cls, tree: Tree, config: str) -> dict[str, str]:
        files = tree.files()
        metadata, tars = _of_layout(tree, files)
        if tars:
            return {name: tree.listing_fact([name], sizes=True) for name in tars}
        facts = {name: tree.content_fact(name) for name in metadata}
        facts["images"] = tree.listing_fact([n for n in files if _is_image(n)])
        texts = [] if metadata else [n for n in files if n.endswith(".txt")]
        return facts | {"texts": tree.listing_fact(texts, sizes=True)}

    def items(self) -> dict[str, Sequence[Item | str]]:
        tree = self._tree
        files = tree.files()
        metadata, tars = _of_layout(tree, files)
        if tars:
            items = {name: [name] for name in tars}
        elif metadata:
            items = {name: _from_metadata(tree, name) for name in metadata}
        else:
            items = {name: [_pair(name)] for name in files if _is_image(name)}
        splits = {}
        for name, found in items.items():
            top = name.split("/")[0] if "/" in name else ""
            splits.setdefault(_SPLITS.get(top, ""), []).extend(found)
        rest = splits.pop("", [])
        if "train" not in splits:
            return hold_out(rest) | splits if rest else _without_train(tree)
        # Images outside of the folders that name a split are for training.
        splits["train"] = rest + splits["train"]
        return splits

    @staticmethod
    def read_archive(tree: Tree, name: str) -> Iterator[Record | Bad]:
        return _read_tar(tree, name)


def _without_train(tree: Tree) -> dict:
    raise UserError(f"{tree.root} has a folder for validation or test, but no images to train on")


def _is_image(name: str) -> bool:
    return name.lower().endswith(_IMAGES)


def _of_layout(tree: Tree, files: list[str]) -> tuple[list[str], list[str]]:
    """(metadata files, tars), of which one is empty; both are if the layout is pairs."""
    metadata = [n for n in files if n.rsplit("/", 1)[-1] in _METADATA]
    tars = [n for n in files if n.endswith(".tar")]
    if metadata:
        return metadata, []
    if tars:
        for name in tars:
            tree.check_tar(name)
        return [], tars
    stems = {_stem(n) for n in files if n.endswith(".txt")}
    if not any(_is_image(n) for n in files):
        raise UserError(f"{tree.root} holds no images ({', '.join(_IMAGES)}) and no .tar files")
    if not any(_is_image(n) and _stem(n) in stems for n in files):
        raise UserError(
            f"{tree.root} holds images but no captions: give them in metadata.jsonl or "
            "metadata.csv (file_name, text), or in a .txt beside each image"
        )
    return [], []


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[0]


def _pair(name: str) -> Item:
    return Item(name, caption_file=f"{_stem(name)}.txt")


def _from_metadata(tree: Tree, name: str) -> list[Item]:
    """Items of a metadata file; the rows of an image become one item."""
    prefix = name[: name.rfind("/") + 1]
    captions: dict[str, list[str]] = {}
    problems = []
    for line, row in _rows(tree, name):
        try:
            if isinstance(row, json.JSONDecodeError):
                raise row
            file, texts = row["file_name"], _captions_of(row)
            if not isinstance(file, str) or not file:
                raise ValueError("file_name is empty")
        except KeyError as error:
            problems.append(Item(f"{name}#{line}", problem=f"no {error}"))
        except (TypeError, ValueError) as error:
            problems.append(Item(f"{name}#{line}", problem=str(error)))
        else:
            captions.setdefault(prefix + file, []).extend(texts)
    if not captions:
        raise UserError(
            f"{tree.root / name} has no row with file_name and one of {', '.join(_CAPTION_KEYS)}"
        )
    return [Item(file, tuple(texts)) for file, texts in captions.items()] + problems


def _rows(tree: Tree, name: str) -> Iterator[tuple[int, dict | json.JSONDecodeError]]:
    text = tree.required_text(name)
    if name.endswith(".csv"):
        reader = csv.DictReader(io.StringIO(text))
        for row in reader:
            yield reader.line_num, row
        return
    # `splitlines` would also cut at separators inside of texts.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, error


def _captions_of(row: dict) -> list[str]:
    for key in _CAPTION_KEYS:
        if row.get(key) is not None:
            value = row[key]
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
                raise ValueError(f"{key} is neither a text nor a list of texts")
            return texts
    raise ValueError(f"none of {', '.join(_CAPTION_KEYS)}")


def _read_tar(tree: Tree, tar: str) -> Iterator[Record | Bad]:
    """The samples of a tar: members in a row whose names are equal up to the first dot."""
    seen = set()
    key, parts = "", {}
    for name, data in tree.tar(tar):
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if data is None:
            yield Bad(
                f"{tar}/{name}", "a link, a device, over 1 GiB or a name that leads out: refused"
            )
            continue
        new_key = f"{folder}/{stem}" if folder else stem
        if new_key != key:
            yield from _sample(tar, key, parts, seen)
            key, parts = new_key, {}
        parts[extension.lower()] = data
    yield from _sample(tar, key, parts, seen)


def _sample(tar: str, key: str, parts: dict[str, bytes], seen: set[str]) -> Iterator[Record | Bad]:
    extension = next((e for e in parts if f".{e}" in _IMAGES), None)
    if not parts or (extension is None and not parts.keys() & {"txt", "json"}):
        return
    file = f"{tar}/{key}.{extension}" if extension else f"{tar}/{key}"
    if extension is None:
        yield Bad(file, "a text without an image")
    elif key in seen:
        yield Bad(file, "an earlier sample of this tar has the same key")
    else:
        seen.add(key)
        try:
            yield Record(file, parts[extension], clean(_sample_captions(file, parts)))
        except (ValueError, AttributeError) as error:
            yield Bad(file, f"captions: {error}")


def _sample_captions(file: str, parts: dict[str, bytes]) -> list[str]:
    if "txt" in parts:
        return decode_text(parts["txt"], file).split("\n")
    if "json" in parts:
        return _captions_of(json.loads(decode_text(parts["json"], file)))
    return []
