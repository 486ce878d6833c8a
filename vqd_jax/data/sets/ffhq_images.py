"""Flickr-Faces-HQ: faces without texts or classes."""

from collections.abc import Sequence

import tensorflow_datasets as tfds

from vqd_jax.data.sets.file_set import FileSet, Item, hold_out
from vqd_jax.data.sets.tree import Tree

_DESCRIPTION = """\
70,000 aligned faces: in the split of the data set's authors, images 0 to 59,999 train and the rest
validate. A smaller part of the set without any of the latter gives up every 20th image for
validation. No captions.
"""

_CITATION = """\
@inproceedings{karras2019style,
  title = {A Style-Based Generator Architecture for Generative Adversarial Networks},
  author = {Karras, Tero and Laine, Samuli and Aila, Timo},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2019},
}
"""

_LICENSE = (
    "The set: Creative Commons BY-NC-SA 4.0, NVIDIA Corporation. Images: their authors' licences "
    "(CC BY 2.0, CC BY-NC 2.0, public domain mark, CC0 or U.S. government works)."
)

_FOLDERS = ("images256x256", "images1024x1024", "thumbnails128x128")
_FIRST_VALIDATION = 60_000


class FfhqImages(FileSet):
    """TFDS builder `ffhq_images`; see `FileSet` for the features."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    NEEDS_CAPTIONS = False

    def _info(self) -> tfds.core.DatasetInfo:
        return self._dataset_info(
            description=_DESCRIPTION,
            citation=_CITATION,
            license=_LICENSE,
            homepage="https://github.com/NVlabs/ffhq-dataset",
        )

    @classmethod
    def facts(cls, tree: Tree, config: str) -> dict[str, str]:
        del config
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


def _folder(tree: Tree) -> str:
    return tree.first("FFHQ images", *_FOLDERS)


def _pictures(tree: Tree, folder: str) -> list[str]:
    # The archive brings a LICENSE.txt in each folder of a thousand.
    stems = ((n, n.rsplit("/", 1)[-1].removesuffix(".png")) for n in tree.files(folder))
    return [name for name, stem in stems if name.endswith(".png") and stem.isdecimal()]
