"""ImageNet (ILSVRC 2012) with class labels and no texts."""

import csv
from collections.abc import Sequence

from vqd_jax.data.sets.file_set import FileSet, Item
from vqd_jax.data.sets.tree import Tree
from vqd_jax.errors import UserError

_ROOTS = ("", "ILSVRC/Data/CLS-LOC/", "Data/CLS-LOC/")
# The class of each validation image, if the folder `val` has no folders of classes.
_VALIDATION_CLASSES = "LOC_val_solution.csv"


class ImagenetClass(FileSet):
    """TFDS builder `imagenet_class`; see `FileSet` for the features. Labels are WordNet ids."""

    HOMEPAGE = "https://image-net.org/challenges/LSVRC/2012/"
    LICENSE = (
        "For non-commercial research and education only, under the terms of access of "
        "image-net.org; copyright remains with the owners of the images."
    )
    NEEDS_CAPTIONS = False

    def labels(self) -> list[str]:
        return self._tree.folders(_folder(self._tree, "train"))

    @classmethod
    def facts(cls, tree: Tree, config: str) -> dict[str, str]:
        facts = {}
        for phase in ("train", "val"):
            folder = _folder(tree, phase)
            facts[folder] = tree.listing_fact(tree.files(folder))
        if not tree.folders(_folder(tree, "train")):
            raise UserError(f"{tree.root / _folder(tree, 'train')} has no folders named by class")
        if not tree.folders(_folder(tree, "val")):
            tree.first("class of each validation image", _VALIDATION_CLASSES)
            facts[_VALIDATION_CLASSES] = tree.content_fact(_VALIDATION_CLASSES)
        return facts

    def items(self) -> dict[str, Sequence[Item]]:
        tree = self._tree
        train, validation = _folder(tree, "train"), _folder(tree, "val")
        classes = set(tree.folders(train))
        if tree.folders(validation):
            held_out = [(name, name.split("/")[-2]) for name in tree.files(validation)]
        else:
            solution = _validation_classes(tree)
            stems = ((n, n.rsplit("/", 1)[-1].split(".")[0]) for n in tree.files(validation))
            held_out = [(name, solution.get(stem, "")) for name, stem in stems]
        return {
            "train": [_item(name, name.split("/")[-2], classes) for name in tree.files(train)],
            "validation": [_item(name, label, classes) for name, label in held_out],
        }


def _item(name: str, label: str, classes: set[str]) -> Item:
    if label not in classes:
        return Item(name, problem=f"class {label or 'unknown'}, which train does not have")
    return Item(name, label=label)


def _folder(tree: Tree, phase: str) -> str:
    return tree.first(f"ImageNet {phase} images", *(f"{root}{phase}" for root in _ROOTS))


def _validation_classes(tree: Tree) -> dict[str, str]:
    """{image name without extension: class}; a row is a name and "class x1 y1 x2 y2 class ..."."""
    rows = csv.reader(tree.required_text(_VALIDATION_CLASSES).splitlines()[1:])
    return {row[0]: row[1].split()[0] for row in rows if len(row) == 2 and row[1].split()}
