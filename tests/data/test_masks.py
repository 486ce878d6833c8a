import io

import numpy as np
import pytest
from PIL import Image

from vqd_jax.data import images, masks
from vqd_jax.errors import UserError

SIDE = 96
REGION = np.zeros((SIDE, SIDE), bool)
REGION[30:60, 30:60] = True
CELLS = np.zeros((8, 8), bool)
CELLS[2:5, 2:5] = True


def strokes(colour, keep=(0, 0, 0, 0)):
    return np.where(REGION[..., None], np.uint8(colour), np.uint8(keep))


def erased():
    y, x = np.mgrid[:SIDE, :SIDE]
    picture = np.stack([2 * x, 2 * y, 200 - x - y, np.full_like(x, 255)], axis=-1).astype(np.uint8)
    return np.where(REGION[..., None], np.uint8(0), picture)


GREY = np.where(REGION, 255, 0).astype(np.uint8)
DRAWN = {
    "black and white": GREY,
    "white strokes": strokes((255, 255, 255, 255)),
    "red strokes": strokes((220, 30, 30, 255)),
    "half red strokes": strokes((220, 30, 30, 128)),
    "a hole": erased(),
    "grey and opacity": np.stack([GREY, GREY], axis=-1),
    "colours": np.stack([GREY] * 3, axis=-1),
    "opaque": np.stack([GREY] * 3 + [np.full_like(GREY, 255)], axis=-1),
    "zero and one": GREY // 255,
}
ARRAYS = {
    "bool": REGION,
    "bool with channels": np.stack([REGION, REGION & False], axis=-1),
    "floats": REGION.astype(np.float32),
    "floats to 255": 255.0 * REGION,
    "16 bits": GREY.astype(np.uint16) * 257,
    "one channel": GREY[..., None],
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_mask_is_the_same_by_file_image_and_array(name, tmp_path):
    array = DRAWN[name]
    image = Image.fromarray(array)
    image.save(tmp_path / "mask.png")
    for found in (masks.read(array), masks.read(image), masks.load(tmp_path / "mask.png")):
        np.testing.assert_array_equal(found, REGION)
    picture = Image.new("RGB", (SIDE, SIDE))
    found = masks.of_tokens(image, picture, (8, 8)).reshape(8, 8)
    np.testing.assert_array_equal(found, CELLS)


@pytest.mark.parametrize("name", ARRAYS)
def test_other_arrays(name):
    np.testing.assert_array_equal(masks.read(ARRAYS[name]), REGION)


def test_pixels_of_other_modes_and_a_turned_mask(tmp_path):
    for mode in ("1", "P", "I;16"):
        image = Image.fromarray(GREY)
        image = (
            Image.fromarray(GREY.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
        )
        image.save(tmp_path / "mask.png")
        np.testing.assert_array_equal(masks.load(tmp_path / "mask.png"), REGION)
    wide = Image.fromarray(np.repeat([[255, 0, 0]], 2, axis=0).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    wide.save(data, "PNG", exif=exif)
    with Image.open(data) as turned:
        assert masks.read(turned).tolist() == [[True, True], [False, False], [False, False]]
        assert masks.of_tokens(turned, turned, (2, 2)).shape == (4,)


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (strokes((0, 0, 0, 255)), "black strokes on a transparent ground"),
        (strokes((255, 255, 255, 0)), "transparent everywhere"),
        (np.dstack([GREY, GREY, GREY, np.where(np.arange(SIDE) < 90, np.uint8(255), 0 * GREY)]),
         "several colours and transparency"),
        (strokes((220, 30, 30, 255), (0, 0, 0, 255)), "the mask has colours"),
        (strokes((220, 30, 30, 255), (255, 255, 255, 255)), "the mask has colours"),
        (np.array([["a"]]), "must be of bool or numbers"),
        (np.array([[-1.0]]), "must lie in"),
        (np.zeros((2, 2, 2, 2)), r"must be \[H, W\]"),
    ],
)  # fmt: skip
def test_what_may_be_read_in_two_ways_is_refused(array, told):
    with pytest.raises(UserError, match=told):
        masks.read(array)


def test_a_file_that_is_no_mask_is_named(tmp_path):
    (tmp_path / "mask.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="mask.png cannot be read as a mask"):
        masks.load(tmp_path / "mask.png")
    Image.fromarray(strokes((0, 0, 0, 255))).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="mask.png: the mask has black strokes"):
        masks.load(tmp_path / "mask.png")


def test_arrays_are_pictures_by_the_rules_of_files():
    deep = np.full((4, 4), 30000, np.uint16)
    sticker = np.zeros((4, 4, 4), np.uint8)
    sticker[0] = (255, 0, 0, 255)
    for array, image in ((deep, Image.fromarray(deep)), (sticker, Image.fromarray(sticker))):
        data = io.BytesIO()
        image.save(data, "PNG")
        for found in (images.pixels(array), images.pixels(image)):
            np.testing.assert_array_equal(found, images.decode(data.getvalue()))
    assert (images.pixels(deep) == 117).all()
    assert images.pixels(sticker)[:, 0].tolist() == [[255, 0, 0]] + [[255] * 3] * 3
    grey = np.arange(4, dtype=np.uint8)[None]
    np.testing.assert_array_equal(images.pixels(grey), images.pixels(grey[..., None]))
    for wrong in (np.zeros((4, 4, 3)), np.zeros((4, 4, 5), np.uint8), np.zeros(4, np.uint8)):
        with pytest.raises(UserError, match="a picture must be uint8"):
            images.pixels(wrong)
