"""Tokens and pictures as text."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from vqd_jax.errors import UserError
from vqd_jax.web import wire


def url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png(size):
    file = io.BytesIO()
    Image.new("1", size).save(file, "PNG")
    return file.getvalue()


def test_codes_come_back():
    codes = np.random.default_rng(0).integers(0, 2**16, (3, 7))
    text = wire.pack(codes)
    assert text.isascii() and not set(text) & set("+/= ")
    np.testing.assert_array_equal(wire.unpack(text, 21, 2**16, "x").reshape(3, 7), codes)


def test_pictures_come_back():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(wire.read_picture(wire.png_url(pixels))), pixels)
    np.testing.assert_array_equal(np.asarray(wire.read_picture(wire.picture_url(pixels))), pixels)


def test_a_sheet_has_the_frames_in_rows():
    frames = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3)).astype(np.uint8)
    text, columns = wire.sheet_url(frames)
    sheet = np.asarray(wire.read_picture(text))
    for number, frame in enumerate(frames):
        row, column = divmod(number, columns)
        cut = sheet[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        np.testing.assert_array_equal(cut, frame)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/etc/passwd", "must be a data URL"),
        (None, "must be a data URL"),
        ("https://example.org/a.png", "must be a data URL"),
        (url(b""), "the file is empty"),
        (url(b"GIF89a"), "cannot be read"),
        ("data:image/png;base64,????", "cannot be read"),
        (url(png((5000, 5000))), "25000000|5000 x 5000 pixels"),
        ("data:image/png;base64," + "A" * (wire.MAX_BYTES * 4 // 3 + 200), "larger than 12 MB"),
    ],
)
def test_what_is_no_picture_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        wire.read_picture(text)
