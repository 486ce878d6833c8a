"""Flickr-Faces-HQ: faces without texts or classes."""

from collections.abc import Sequence

from vqd_jax.data.sets.file_set import FileSet, Item
from vqd_jax.data.sets.splits import hold_out
from vqd_jax.data.sets.tree import Tree

_FOLDERS = ("images256x256", "images1024x1024", "thumbnails128x128")
_FIRST_VALIDATION = 60_000


class FfhqImages(FileSet):
    """TFDS builder `ffhq_images`; see `FileSet` for the features."""

    HOMEPAGE = "https://github.com/NVlabs/ffhq-dataset"
    LICENSE = (
        "The set: Creative Commons BY-NC-SA 4.0, NVIDIA Corporation. Images: their authors' "
        "licences (CC BY 2.0, CC BY-NC 2.0, public domain mark, CC0 or U.S. government works)."
    )
    NEEDS_CAPTIONS = False

    @classmethod
    def facts(cls, tree: Tree, config: str) -> dict[str, str]:
        folder = _folder(tree)
        return {folder: tree.listing_fact(_pictures(tree, folder))}

    def items(self) -> dict[str, Sequence[Item]]:
        splits = {"train": [], "validation": []}
        for name in _pictures(self._tree, _folder(self._tree)):
            number = int(name.rsplit("/", 1)[-1].removesuffix(".png"))
            splits["validation" if number >= _FIRST_VALIDATION else "train"].append(Item(name))
        if not all(splits.values()):
            return hold_out(splits["train"] + splits["validation"])
        return splits

    def listing(self) -> list[str]:
        return self._tree.files(_folder(self._tree))


def _folder(tree: Tree) -> str:
    return tree.first("FFHQ images", *_FOLDERS)


def _pictures(tree: Tree, folder: str) -> list[str]:
    # The publisher puts a LICENSE.txt into each folder of a thousand images.
    stems = ((n, n.rsplit("/", 1)[-1].removesuffix(".png")) for n in tree.files(folder))
    return [name for name, stem in stems if name.endswith(".png") and stem.isdecimal()]
