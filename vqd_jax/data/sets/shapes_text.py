"""Procedural pictures of coloured shapes with captions, for tests and controlled experiments.

A scene is a pure function of (seed, index, split). It has a pale background and one or two objects,
each with a colour, a shape, a size and a position on a 3x3 grid. The function
`vqd_jax.evaluation.attributes.read_attributes` measures what a generated picture shows.

Letters: S image side in pixels.
"""

import dataclasses
import math
import zlib
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image, ImageDraw

COLOURS = {
    "red": (215, 25, 35),
    "orange": (250, 135, 10),
    "yellow": (245, 215, 0),
    "green": (20, 145, 50),
    "cyan": (0, 195, 205),
    "blue": (25, 55, 220),
    "purple": (140, 30, 165),
    "black": (15, 15, 15),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "grey": (200, 200, 200),
    "pale blue": (200, 220, 255),
    "pale green": (205, 245, 205),
    "pale pink": (255, 205, 220),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
SIZES = ("small", "large")
POSITIONS = (
    *("top left", "top", "top right"),
    *("left", "centre", "right"),
    *("bottom left", "bottom", "bottom right"),
)
# Radii and offsets are shares of the image side. On this grid every object lies inside the picture,
# and two objects in opposite rows or columns are at least a pixel apart at S = 32.
GRID = (0.27, 0.5, 0.73)
_JITTER = 0.015
RADII = {"small": (0.13, 0.15), "large": (0.21, 0.23)}

SPLITS = ("train", "validation", "test")
_ATTRIBUTES = ("colour", "shape", "size", "position")
_TWO_OBJECTS_RATE = 0.25
_SUPERSAMPLING = 4

_SYNONYMS = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "tangerine"),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue", "cobalt"),
    "purple": ("purple", "violet"),
    "black": ("black", "jet black"),
    "circle": ("circle", "ball", "disc"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "pyramid"),
    "diamond": ("diamond", "rhombus"),
    "cross": ("cross", "plus sign"),
    "star": ("star", "five-pointed star"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "left": ("on the left", "on the left side", "to the left"),
    "right": ("on the right", "on the right side", "to the right"),
    "top": ("at the top", "on the top side", "near the top"),
    "bottom": ("at the bottom", "on the bottom side", "near the bottom"),
    "centre": ("in the centre", "in the middle", "in the center"),
    "top left": ("at the top left", "in the upper left", "in the top left corner"),
    "top right": ("at the top right", "in the upper right", "in the top right corner"),
    "bottom left": ("at the bottom left", "in the lower left", "in the bottom left corner"),
    "bottom right": ("at the bottom right", "in the lower right", "in the bottom right corner"),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One object. `x`, `y` (centroid) and `radius` are shares of the image side."""

    colour: str
    shape: str
    size: str
    position: str
    x: float
    y: float
    radius: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """A background and one or two objects of different colours that do not touch."""

    background: str
    objects: tuple[Shape, ...]


def is_held_out(colour: str, shape: str) -> bool:
    """Whether a pair of colour and shape occurs in the test split only.

    These are one shape of every colour and at most two colours of every shape, so that each value
    on its own occurs in training.
    """
    return (5 * list(COLOURS).index(colour) + 1) % len(SHAPES) == SHAPES.index(shape)


def _choose(rng: np.random.Generator, values):
    return values[rng.integers(len(values))]


def _object(rng: np.random.Generator, colour: str, held_out: bool, size: str, position: str):
    shape = _choose(rng, [s for s in SHAPES if is_held_out(colour, s) == held_out])
    row, column = divmod(POSITIONS.index(position), 3)
    x, y = (GRID[i] + rng.uniform(-_JITTER, _JITTER) for i in (column, row))
    return Shape(colour, shape, size, position, x, y, rng.uniform(*RADII[size]))


def _apart(first: str, second: str) -> bool:
    (r1, c1), (r2, c2) = (divmod(POSITIONS.index(p), 3) for p in (first, second))
    return abs(r1 - r2) == 2 or abs(c1 - c2) == 2


def scene(seed: int, index: int, split: str) -> Scene:
    """The scene at a place of a split. Equal arguments give equal scenes on any machine.

    Args:
      seed: of the whole data set, >= 0.
      index: place in the split, >= 0.
      split: 'train', 'validation' or 'test'. A test scene has an object for which ``is_held_out``;
        scenes of the other splits have none.

    Raises:
      ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it is one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    colour, other = rng.choice(list(COLOURS), 2, replace=False).tolist()
    position = _choose(rng, POSITIONS)
    size = _choose(rng, SIZES)
    background = _choose(rng, list(BACKGROUNDS))
    objects = [_object(rng, colour, split == "test", size, position)]
    # Two large objects would touch, and no place is far enough from the centre.
    if rng.uniform() < _TWO_OBJECTS_RATE and position != "centre":
        place = _choose(rng, [p for p in POSITIONS if _apart(position, p)])
        size = "small" if size == "large" else _choose(rng, SIZES)
        objects.append(_object(rng, other, False, size, place))
    return Scene(background, tuple(objects))


def _outline(shape: str, radius: float) -> np.ndarray:
    """Corners [P, 2] around the centroid. At one radius all shapes have about the same weight."""

    def regular(radii, first):
        angles = first + np.arange(len(radii)) * (2 * math.pi / len(radii))
        return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.asarray(radii)[:, None]

    if shape == "square":
        corners = 0.88 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    elif shape == "triangle":
        corners = regular([1.1] * 3, -math.pi / 2)
    elif shape == "diamond":
        corners = np.array([(0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0)])
    elif shape == "cross":
        a = 0.34
        corners = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
        corners = np.array(corners + [(-x, -y) for x, y in corners])
    elif shape == "star":
        corners = regular([1.1, 0.45] * 5, -math.pi / 2)
    else:
        raise ValueError(f"shape is {shape!r}; it is one of {', '.join(SHAPES)}")
    return radius * corners


def coverage(shape: str, x: float, y: float, radius: float, size: int) -> np.ndarray:
    """The share of every pixel that a shape covers.

    Args:
      shape: one of `SHAPES`.
      x, y, radius: centroid and radius in pixels.
      size: S.

    Returns:
      float32 [S, S] in 0..1.
    """
    k = _SUPERSAMPLING
    canvas = Image.new("L", (k * size, k * size))
    draw = ImageDraw.Draw(canvas)
    # Pillow rounds coordinates down and paints both end points of a span. The constants undo that:
    # the centre is right to an eighth of a pixel and the area to 3 %.
    if shape == "circle":
        low, high = (k * (np.array([x, y]) + sign * radius) + 0.5 for sign in (-1, 1))
        draw.ellipse([*low, *(high - 1)], fill=255)
    else:
        corners = k * np.array([x, y]) + _outline(shape, k * radius - 0.7)
        draw.polygon([tuple(p) for p in corners], fill=255)
    return np.asarray(canvas.reduce(k), np.float32) / 255


def render(scene: Scene, size: int) -> np.ndarray:
    """Draws a scene with anti-aliased edges. Returns uint8 [S, S, 3]."""
    image = np.empty((size, size, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for o in scene.objects:
        cover = coverage(o.shape, o.x * size, o.y * size, o.radius * size, size)[..., None]
        image += cover * (np.array(COLOURS[o.colour], np.float32) - image)
    return np.rint(image).astype(np.uint8)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _phrase(o: Shape, word, order: int) -> str:
    what = f"{word(o.size)} {word(o.colour)} {word(o.shape)}"
    if order == 0:
        return f"{_with_article(what)} {word(o.position)}"
    if order == 1:
        return f"{what}, {word(o.position)}"
    if order == 2:
        return f"{word(o.position)}, {_with_article(what)}"
    what = f"{word(o.colour)} {word(o.shape)}"
    return f"{_with_article(what)} {word(o.position)}, {word(o.size)}"


def captions(scene: Scene) -> list[str]:
    """Four lower-case captions of a scene, each with all four attributes of every object.

    The first has plain words, a fixed order and the background. The others vary words and order,
    and half of them name the background. They are a pure function of the scene.
    """
    first = " and ".join(_phrase(o, lambda w: _SYNONYMS.get(w, (w,))[0], 0) for o in scene.objects)
    result = [f"{first}, {scene.background} background"]
    rng = np.random.default_rng(zlib.crc32(repr(scene).encode()))
    for _ in range(3):
        order = int(rng.integers(4))
        objects = list(scene.objects)
        if rng.uniform() < 0.5:
            objects.reverse()
        joint = (" and ", "; ", "; ", "; ")[order]
        text = joint.join(_phrase(o, lambda w: _choose(rng, _SYNONYMS[w]), order) for o in objects)
        if rng.uniform() < 0.5:
            text += f", on {_with_article(scene.background)} background"
        result.append(text)
    return result


@dataclasses.dataclass
class ShapesConfig(tfds.core.BuilderConfig):
    """Image side in pixels, seed, and numbers of examples in the three splits."""

    image_size: int = 32
    seed: int = 0
    num_train: int = 10_000
    num_validation: int = 500
    num_test: int = 500


class ShapesText(tfds.core.GeneratorBasedBuilder):
    """TFDS builder `shapes_text`.

    Features: `image` uint8 [S, S, 3]; `captions`, 4 texts, the first in plain words; `objects`, a
    sequence of texts `colour`, `shape`, `size` and `position`; `background`, a text; `file`,
    "split/index".
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    pkg_dir_path = epath.resource_path("vqd_jax.data") / "assets" / "shapes_text"
    BUILDER_CONFIGS = [
        ShapesConfig(name="32px", description="32x32 pixels"),
        ShapesConfig(name="64px", description="64x64 pixels", image_size=64),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.image_size
        text = tfds.features.Text
        attributes = {name: text() for name in _ATTRIBUTES}
        return self.dataset_info_from_configs(
            license="CC0 1.0 (generated pictures and captions).",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                    "captions": tfds.features.Sequence(text()),
                    "objects": tfds.features.Sequence(attributes),
                    "background": text(),
                    "file": text(),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # Nothing is downloaded.
        config = self.builder_config
        counts = (config.num_train, config.num_validation, config.num_test)
        return {s: self._generate_examples(s, n) for s, n in zip(SPLITS, counts, strict=True)}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict]]:
        config = self.builder_config
        for index in range(count):
            drawn = scene(config.seed, index, split)
            yield (
                index,
                {
                    "image": Image.fromarray(render(drawn, config.image_size)),
                    "captions": captions(drawn),
                    "objects": [{n: getattr(o, n) for n in _ATTRIBUTES} for o in drawn.objects],
                    "background": drawn.background,
                    "file": f"{split}/{index:06d}",
                },
            )
