"""A folder of the user's own images and texts, in one of three layouts.

* Hugging Face imagefolder: `metadata.jsonl` or `metadata.csv` with `file_name` and `text` (or
  `caption`, `captions`), beside the images or beside the folders that hold them; see ``metadata``.
* Pairs: `name.jpg` and `name.txt`, which has a caption on each line.
* Tars of img2dataset or webdataset, which are streamed: samples of `key.jpg` and `key.txt`, or
  `key.json` with `caption`; see ``tar_samples``.

Folders called `train`, `validation` (`val`, `valid`, `dev`) or `test`, at any depth, in any case,
are the splits; see ``splits``. Without them, every 20th image or tar is for validation.
"""

from collections.abc import Iterator, Sequence

import tensorflow_datasets as tfds

from vqd_jax.data import images
from vqd_jax.data.sets import metadata, splits, tar_samples
from vqd_jax.data.sets.file_set import Bad, FileSet, Item, Record, check, read_item
from vqd_jax.data.sets.tree import Tree, canonical
from vqd_jax.errors import UserError

_TEXT = ".txt"


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
        tables, tars = _of_layout(tree, files)
        if tars:
            return {name: tree.listing_fact([name], sizes=True) for name in tars}
        facts = {name: tree.content_fact(name) for name in tables}
        facts["images"] = tree.listing_fact(_pictures(tree, files), sizes=True)
        texts = [] if tables else [n for n in files if n.lower().endswith(_TEXT)]
        return facts | {"texts": tree.listing_fact(texts, sizes=True)}

    def items(self) -> dict[str, Sequence[Item | str]]:
        tree = self._tree
        files = tree.files()
        tables, tars = _of_layout(tree, files)
        if tars:
            items = tars
        elif tables:
            items = metadata.items(tree, tables, files)
        else:
            items = _pairs(files, set(_pictures(tree, files)))
        names = {item: item if isinstance(item, str) else item.file for item in items}
        divided = splits.divided(names, archives=bool(tars))
        found = splits.with_training(divided, "tar" if tars else "picture", self._is_usable)
        if found is None:
            raise UserError(
                f"{tree.root} has folders for validation or test, but no images to train on"
            )
        return found

    def _is_usable(self, item: Item | str) -> bool:
        results = read_item(self._tree, item, self.read_archive)
        return any(isinstance(check(r, self.NEEDS_CAPTIONS), Record) for r in results)

    def listing(self) -> list[str]:
        files = self._tree.files()
        tables, _ = _of_layout(self._tree, files)
        return [name for name in files if name not in tables]

    def why_left_out(self, names: Sequence[str]) -> Iterator[str]:
        tables, tars = _of_layout(self._tree, self._tree.files())
        for name in names:
            if tables and images.has_picture_name(name):
                yield "no row of the metadata names it"
            elif tables or tars:
                yield f"not read: the captions are in {(tables or tars)[0]}"
            elif name.lower().endswith(_TEXT):
                yield "a text without an image"
            else:
                yield "neither a picture that this program reads nor a text"

    @staticmethod
    def read_archive(tree: Tree, name: str) -> Iterator[Record | Bad]:
        return tar_samples.read(tree, name)


def _pictures(tree: Tree, files: list[str]) -> list[str]:
    """The files that are pictures by their names or, where a name tells nothing, their content."""
    return [
        name
        for name in files
        if images.has_picture_name(name)
        or (_is_unknown(name) and images.has_picture_bytes(tree.beginning(name)))
    ]


def _is_unknown(name: str) -> bool:
    return not name.lower().endswith((_TEXT, ".json", ".jsonl", ".csv", ".tsv", ".tar", ".zip"))


def _of_layout(tree: Tree, files: list[str]) -> tuple[list[str], list[str]]:
    """(metadata files, tars), of which one is empty; both are if the layout is pairs."""
    tables = [n for n in files if n.rsplit("/", 1)[-1].lower() in metadata.NAMES]
    tars = [n for n in files if n.lower().endswith(".tar")]
    if tables:
        return tables, []
    if tars:
        for name in tars:
            tree.check_tar(name)
        return [], tars
    pictures = _pictures(tree, files)
    stems = {_stem(n) for n in files if n.lower().endswith(_TEXT)}
    if not pictures:
        raise UserError(
            f"{tree.root} holds no images ({', '.join(images.SUFFIXES)}) and no .tar files"
        )
    if not any(_stem(n) in stems for n in pictures):
        raise UserError(
            f"{tree.root} holds images but no captions: give them in metadata.jsonl or "
            "metadata.csv (file_name, text), or in a .txt beside each image"
        )
    return [], []


def _stem(name: str) -> str:
    return canonical(name.rsplit(".", 1)[0])


def _pairs(files: list[str], pictures: set[str]) -> list[Item]:
    """An item for each picture, and for each text beside a file that is no picture."""
    groups: dict[str, list[str]] = {}
    for name in files:
        groups.setdefault(_stem(name), []).append(name)
    items = []
    for names in groups.values():
        found = [name for name in names if name in pictures]
        texts = [name for name in names if name.lower().endswith(_TEXT)]
        also = tuple(name for name in names if name not in found and name not in texts[:1])
        if texts and also and not found:
            problem = "not a picture that this program reads"
            items.append(Item(also[0], caption_file=texts[0], also=also[1:], problem=problem))
        for name in found:
            # A missing text is named as it should be called.
            text = texts[0] if texts else f"{name.rsplit('.', 1)[0]}{_TEXT}"
            items.append(Item(name, caption_file=text, also=also))
    return items
