"""What a picture of coloured shapes shows: measured from pixels, not taken from a model.

The inverse of `vqd_jax.data.sets.shapes_text.render`, meant for reconstructions and samples:
it tolerates mild noise and blur. Letters: S image side in pixels.
"""

import itertools

import numpy as np
from scipy import ndimage

from vqd_jax.data.sets import shapes_text

ATTRIBUTES = ("colour", "shape", "size", "position")

# Euclidean RGB distance from the background that counts as an object; the palest object colour is
# more than twice as far from every background.
_OBJECT_DISTANCE = 70.0
# Smaller spots are noise. In shares of the picture; the smallest object covers 0.019.
_MIN_AREA = 0.008
# Width of the blur under which shapes are compared, in shares of the image side.
_SOFTNESS = 0.03


def _nearest(colour: np.ndarray, names: dict) -> str:
    distances = np.linalg.norm(np.array(list(names.values()), float) - colour, axis=1)
    return list(names)[int(distances.argmin())]


def _background_colour(image: np.ndarray) -> np.ndarray:
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    return np.median(border, axis=0)


def read_background(image: np.ndarray) -> str:
    """The background's name, from the median border pixel of an image uint8 [S, S, 3]."""
    return _nearest(_background_colour(image.astype(float)), shapes_text.BACKGROUNDS)


# Area of every shape in units of its squared radius, measured in a drawing of 64 x 64 pixels.
_AREAS = {
    shape: shapes_text.coverage(shape, 32.0, 32.0, 20.0, 64).sum() / 20.0**2
    for shape in shapes_text.SHAPES
}


def _fit_shape(alpha: np.ndarray) -> tuple[str, float, float, float]:
    """The shape whose drawing at the measured centroid and area differs least from `alpha`.

    Args:
      alpha: share of every pixel that the object covers, float [S, S].

    Returns:
      Shape, x, y and radius in pixels.
    """
    size = len(alpha)
    area = alpha.sum()
    centres = np.arange(size) + 0.5
    x, y = alpha.sum(0) @ centres / area, alpha.sum(1) @ centres / area
    # A little blur on both sides calms noise and makes soft edges comparable with sharp ones.
    softness = _SOFTNESS * size
    target = ndimage.gaussian_filter(alpha, softness)

    def difference(shape):
        radius = np.sqrt(area / _AREAS[shape])
        drawn = shapes_text.coverage(shape, x, y, radius, size)
        return np.square(ndimage.gaussian_filter(drawn, softness) - target).sum()

    shape = min(shapes_text.SHAPES, key=difference)
    return shape, x, y, float(np.sqrt(area / _AREAS[shape]))


def _position(x: float, y: float) -> str:
    """The nearest place of the grid for a centroid in shares of the image side."""
    grid = np.array(shapes_text.GRID)
    column, row = (int(np.abs(grid - v).argmin()) for v in (x, y))
    return shapes_text.POSITIONS[3 * row + column]


def read_attributes(image: np.ndarray) -> list[dict[str, str]]:
    """Measures the objects of a picture.

    Args:
      image: uint8 [S, S, 3], S >= 16: objects apart from each other on an even, pale background.

    Returns:
      A dict of `ATTRIBUTES` for every object, from top to bottom and left to right of their places
      on the grid. An empty picture gives an empty list; any other picture gives names too, so
      compare the number of objects before trusting them.

    Raises:
      ValueError: not uint8 [S, S, 3].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[:2] != (len(image),) * 2:
        raise ValueError(f"image is {image.dtype} {image.shape}; it must be uint8 [S, S, 3]")
    size = len(image)
    pixels = image.astype(float)
    background = _background_colour(pixels)
    offset = pixels - background
    smooth = ndimage.gaussian_filter(offset, (0.015 * size, 0.015 * size, 0))
    distance = np.linalg.norm(smooth, axis=-1)
    labels, count = ndimage.label(distance > _OBJECT_DISTANCE)
    areas = ndimage.sum_labels(np.ones_like(labels), labels, np.arange(1, count + 1))
    found = []
    for label in np.flatnonzero(areas >= _MIN_AREA * size**2) + 1:
        inside = labels == label
        # Edge pixels mix object and background, which can look like a third colour.
        core = inside & (distance >= 0.8 * np.percentile(distance[inside], 90))
        colour = np.median(pixels[core], axis=0)
        direction = (colour - background) / np.square(colour - background).sum()
        near = ndimage.binary_dilation(inside, iterations=max(1, size // 24))
        near &= (labels == label) | (labels == 0)
        alpha = np.where(near, np.clip(offset @ direction, 0, 1), 0)
        shape, x, y, radius = _fit_shape(alpha)
        limit = (shapes_text.RADII["small"][1] + shapes_text.RADII["large"][0]) / 2
        found.append(
            {
                "colour": _nearest(colour, shapes_text.COLOURS),
                "shape": shape,
                "size": "small" if radius < limit * size else "large",
                "position": _position(x / size, y / size),
            }
        )
    return sorted(found, key=lambda o: shapes_text.POSITIONS.index(o["position"]))


def attribute_scores(image: np.ndarray, wanted: list[dict[str, str]]) -> dict[str, float]:
    """How much of what a caption asks for is in a picture.

    Args:
      image: uint8 [S, S, 3].
      wanted: at least one object, each with `ATTRIBUTES`.

    Returns:
      For each of `ATTRIBUTES` the share of wanted objects that have it right under the best
      pairing of found and wanted objects (a missing object has everything wrong), and under
      'count' 1.0 if the number of objects is right, else 0.0.
    """
    found = read_attributes(image)
    padded = found + [{}] * (len(wanted) - len(found))

    def right(chosen):
        return [[a.get(n) == b[n] for n in ATTRIBUTES] for a, b in zip(chosen, wanted, strict=True)]

    # Noise can look like many objects; the first few are enough to tell that.
    pairings = itertools.permutations(padded[:6], len(wanted))
    best = np.mean(max((right(p) for p in pairings), key=np.sum), axis=0)
    scores = dict(zip(ATTRIBUTES, map(float, best), strict=True))
    return scores | {"count": float(len(found) == len(wanted))}
