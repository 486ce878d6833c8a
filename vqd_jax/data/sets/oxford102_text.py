"""Oxford 102 flowers with the ten captions of Reed et al."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import scipy.io

from vqd_jax.data.sets.file_set import FileSet, Item
from vqd_jax.data.sets.tree import Tree
from vqd_jax.errors import UserError

# In the order of the numbers in imagelabels.mat.
_CLASSES = """
pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger
lily, moon orchid, bird of paradise, monkshood, globe thistle, snapdragon, colt's foot, king
protea, spear thistle, yellow iris, globe-flower, purple coneflower, peruvian lily, balloon
flower, giant white arum lily, fire lily, pincushion flower, fritillary, red ginger, grape
hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke, sweet william,
carnation, garden phlox, love in the mist, mexican aster, alpine sea holly, ruby-lipped
cattleya, cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy, daffodil,
sword lily, poinsettia, bolero deep blue, wallflower, marigold, buttercup, oxeye daisy, common
dandelion, petunia, wild pansy, primula, sunflower, pelargonium, bishop of llandaff, gaura,
geranium, orange dahlia, pink-yellow dahlia?, cautleya spicata, japanese anemone, black-eyed
susan, silverbush, californian poppy, osteospermum, spring crocus, bearded iris, windflower,
tree poppy, gazania, azalea, water lily, rose, thorn apple, morning glory, passion flower,
lotus, toad lily, anthurium, frangipani, clematis, hibiscus, columbine, desert-rose, tree
mallow, magnolia, cyclamen, watercress, canna lily, hippeastrum, bee balm, ball moss, foxglove,
bougainvillea, camellia, mallow, mexican petunia, bromelia, blanket flower, trumpet creeper,
blackberry lily
"""

_SPLITS = {"train": "trnid", "validation": "valid", "test": "tstid"}


class Oxford102Text(FileSet):
    """TFDS builder `oxford102_text`; see `FileSet` for the features."""

    HOMEPAGE = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
    LICENSE = (
        "Images: collected from the web for research; no licence is stated and copyright remains "
        "with their owners. Captions: released for research by their authors without a stated "
        "licence."
    )

    def labels(self) -> list[str]:
        return class_names()

    @classmethod
    def facts(cls, tree: Tree, config: str) -> dict[str, str]:
        images, captions = _images(tree), _captions(tree)
        files = [tree.first("Oxford 102 table", f"{n}.mat") for n in ("imagelabels", "setid")]
        facts = {name: tree.content_fact(name) for name in files}
        facts[images] = tree.listing_fact(tree.files(images))
        facts[captions] = tree.listing_fact(tree.files(captions), sizes=True)
        return facts

    def items(self) -> dict[str, Sequence[Item]]:
        tree = self._tree
        images, captions = _images(tree), _captions(tree)
        labels = _table(tree, "imagelabels.mat", "labels")
        names = class_names()

        def item(number: int) -> Item:
            file = f"{images}/image_{number:05d}.jpg"
            if not 1 <= number <= len(labels) or not 1 <= labels[number - 1] <= len(names):
                return Item(file, problem="imagelabels.mat has no class for it")
            label = int(labels[number - 1])
            texts = f"{captions}/class_{label:05d}/image_{number:05d}.txt"
            return Item(file, caption_file=texts, label=names[label - 1])

        return {
            split: [item(int(number)) for number in _table(tree, "setid.mat", key)]
            for split, key in _SPLITS.items()
        }

    def listing(self) -> list[str]:
        tree = self._tree
        return tree.files(_images(tree)) + tree.files(_captions(tree))


def class_names() -> list[str]:
    """The 102 classes, in the order of the data set."""
    return [name.strip() for name in _CLASSES.replace("\n", " ").split(",")]


def _images(tree: Tree) -> str:
    return tree.first("Oxford 102 images", "jpg", "102flowers/jpg")


def _captions(tree: Tree) -> str:
    return tree.first("captions of Reed et al.", "text_c10", "cvpr2016_flowers/text_c10")


def _table(tree: Tree, name: str, key: str) -> np.ndarray:
    data = BytesIO(tree.required(name))
    try:
        return scipy.io.loadmat(data, variable_names=[key])[key].ravel()
    # scipy reports damage in many ways, and a missing key as KeyError.
    except Exception as error:
        raise UserError(f"{tree.root / name} has no table {key!r}: {error}") from error
