"""CUB-200-2011 birds with the ten captions of Reed et al., in the two splits in use."""

from collections.abc import Sequence

import tensorflow_datasets as tfds

from vqd_jax.data.sets.file_set import FileSet, Item
from vqd_jax.data.sets.tree import Tree
from vqd_jax.errors import UserError

_ROOTS = ("", "CUB_200_2011/", "birds/CUB_200_2011/")
_CAPTIONS = (
    "text_c10",
    "cvpr2016_cub/text_c10",
    "CUB_200_2011/text_c10",
    "text/text",
    "birds/text",
)


class CubText(FileSet):
    """TFDS builder `cub_text`; see `FileSet` for the features. Labels are the class folders."""

    HOMEPAGE = "https://www.vision.caltech.edu/datasets/cub_200_2011/"
    LICENSE = (
        "Images: for non-commercial research and education; copyright remains with the "
        "photographers. Captions: released for research by their authors without a stated licence."
    )
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="official", description="train_test_split.txt"),
        tfds.core.BuilderConfig(name="published", description="filenames.pickle"),
    ]

    def labels(self) -> list[str]:
        return self._tree.folders(_images(self._tree))

    @classmethod
    def facts(cls, tree: Tree, config: str) -> dict[str, str]:
        images, captions = _images(tree), _captions(tree)
        facts = {name: tree.content_fact(name) for name in _split_files(tree, config)}
        facts[images] = tree.listing_fact(tree.files(images))
        facts[captions] = tree.listing_fact(tree.files(captions), sizes=True)
        return facts

    def items(self) -> dict[str, Sequence[Item]]:
        tree = self._tree
        config = self.builder_config.name
        read = _published_split if config == "published" else _official_split
        folder, captions = _images(tree), _captions(tree)
        return {
            split: [
                Item(
                    f"{folder}/{name}.jpg",
                    caption_file=f"{captions}/{name}.txt",
                    label=name.split("/")[0],
                )
                for name in names
            ]
            for split, names in read(tree, *_split_files(tree, config)).items()
        }

    def listing(self) -> list[str]:
        tree = self._tree
        return tree.files(_images(tree)) + tree.files(_captions(tree))


def _images(tree: Tree) -> str:
    return tree.first("CUB-200-2011 images", *(f"{root}images" for root in _ROOTS))


def _captions(tree: Tree) -> str:
    return tree.first("captions of Reed et al.", *_CAPTIONS)


def _split_files(tree: Tree, config: str) -> list[str]:
    if config == "published":
        return [
            tree.first(f"list of {s} images", *(f"{p}{s}/filenames.pickle" for p in ("", "birds/")))
            for s in ("train", "test")
        ]
    return [
        tree.first("CUB-200-2011 split", *(f"{root}{name}" for root in _ROOTS))
        for name in ("images.txt", "train_test_split.txt")
    ]


def _published_split(tree: Tree, train: str, test: str) -> dict[str, list[str]]:
    return {"train": tree.strings(train), "test": tree.strings(test)}


def _official_split(tree: Tree, images: str, split: str) -> dict[str, list[str]]:
    names = _table(tree, images)
    is_train = _table(tree, split)
    if names.keys() != is_train.keys() or not set(is_train.values()) <= {"0", "1"}:
        raise UserError(f"{tree.root / split} does not give 0 or 1 for each image of {images}")
    stems = {number: name.rsplit(".", 1)[0] for number, name in names.items()}
    return {
        "train": [stems[number] for number in stems if is_train[number] == "1"],
        "test": [stems[number] for number in stems if is_train[number] == "0"],
    }


def _table(tree: Tree, name: str) -> dict[str, str]:
    """{first word: rest} of every line."""
    rows = [line.split(maxsplit=1) for line in tree.required_text(name).splitlines() if line]
    if not all(len(row) == 2 for row in rows):
        raise UserError(f"{tree.root / name}: every line must hold a number and a value")
    return {number: value.strip() for number, value in rows}
