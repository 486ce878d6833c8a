import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from vqd_jax.data import encoded, images

# Columns: the XYZ (D50) of the primaries of Display P3 and of sRGB.
P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
GAMMA = 2.2


def profile(name=b"Display P3"):
    """An ICC profile of version 2 with the primaries of Display P3 and a plain gamma."""

    def fixed(x):
        return struct.pack(">i", round(x * 65536))

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))

    described = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + bytes(12 + 67)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(GAMMA * 256)) + b"\0\0"
    tags = {b"desc": described, b"wtpt": xyz([0.9642, 1, 0.8249]), b"cprt": b"text\0\0\0\0none\0"}
    for letter, column in zip(b"rgb", P3.T, strict=True):
        tags[bytes([letter]) + b"XYZ"] = xyz(column)
        tags[bytes([letter]) + b"TRC"] = curve
    table, data = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", start + len(data), len(content))
        data += content
    head = struct.pack(
        ">I4sI4s4s4s", start + len(data), b"\0\0\0\0", 0x02100000, b"mntr", b"RGB ", b"XYZ "
    )
    head += bytes(12) + b"acsp" + bytes(28) + b"".join(map(fixed, [0.9642, 1, 0.8249]))
    return head.ljust(128, b"\0") + table + data


def in_srgb(colour):
    linear = np.linalg.solve(SRGB, P3 @ (np.array(colour) / 255) ** GAMMA).clip(0, 1)
    return 255 * np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def saved(image, format, **options):
    data = io.BytesIO()
    image.save(data, format, **options)
    return data.getvalue()


@pytest.mark.parametrize("colour", [(200, 100, 50), (60, 180, 90), (128, 128, 128), (255, 0, 0)])
def test_display_p3_becomes_srgb(colour):
    image = Image.new("RGB", (16, 16), colour)
    expected = in_srgb(colour)
    assert max(colour) == min(colour) or np.abs(expected - colour).max() > 5 or 255 in colour
    for format, options in (("PNG", {}), ("JPEG", {"quality": 100, "subsampling": 0})):
        data = saved(image, format, icc_profile=profile(), **options)
        found = images.decode(data)
        np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=2.5)
        with Image.open(io.BytesIO(data)) as opened:
            np.testing.assert_array_equal(images.pixels(opened), found)


def test_profiles_of_other_modes_and_opacity():
    clear = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    clear.paste((200, 100, 50, 255), (0, 0, 4, 2))
    found = images.decode(saved(clear, "PNG", icc_profile=profile()))
    np.testing.assert_allclose(found[0, 0], in_srgb((200, 100, 50)), atol=2)
    assert (found[3] == 255).all()
    # A profile of colours on a grey picture, that of sRGB, and one that is damaged.
    grey = Image.new("L", (4, 4), 77)
    assert (images.decode(saved(grey, "PNG", icc_profile=profile())) == 77).all()
    plain = Image.new("RGB", (4, 4), (200, 100, 50))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for other in (srgb, profile(b"sRGB IEC61966-2.1"), profile()[:90], b"\0" * 200):
        found = images.decode(saved(plain, "PNG", icc_profile=other))
        assert found[0, 0].tolist() == [200, 100, 50]


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))


def chunk_at(data, kind):
    return data.index(kind) - 4


def test_what_surrounds_the_pixels_of_a_png_costs_nothing():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("comment", "a" * 50)
    texts.add_text("long", "b" * 2_000_000, zip=True)
    texts.add_text("bomb", "c" * 80_000_000, zip=True)
    data = saved(noise(), "PNG", pnginfo=texts, icc_profile=profile(b"sRGB"))
    pixels = np.asarray(noise())
    np.testing.assert_array_equal(images.decode(data), pixels)
    for kind in (b"tEXt", b"iCCP"):
        place = chunk_at(data, kind)
        damaged = bytearray(data)
        damaged[place + 10] ^= 1
        np.testing.assert_array_equal(images.decode(bytes(damaged)), pixels)


def test_damaged_pixels_of_a_png_are_never_shown():
    data = saved(noise(), "PNG")
    start = chunk_at(data, b"IDAT") + 8
    refused = 0
    for place in range(start, len(data) - 20, 97):
        damaged = bytearray(data)
        damaged[place] ^= 4
        with pytest.raises(ValueError):
            images.decode(bytes(damaged))
        refused += 1
    assert refused > 10
    # The last four bytes of the stream, a checksum that Pillow does not read.
    damaged = bytearray(data)
    damaged[-13] ^= 1
    with pytest.raises(ValueError, match="the checksum of IDAT is wrong"):
        images.decode(bytes(damaged))


def test_what_surrounds_the_pixels_of_a_jpeg_costs_nothing():
    data = saved(noise(), "JPEG", quality=95)
    pixels = images.decode(data)
    for segment in (
        b"\xff\xe1\0\x10Exif\0\0II*\0\xff\xff\xff\xff",
        b"\xff\xe2\0\x14ICC_PROFILE\0\x05\x02aa",
        b"\xff\xed\0\x18Photoshop 3.0\x008BIM\x04\x04",
        b"\xff\xfe\0\x06\xff\xd8\xff\xd9",
    ):
        np.testing.assert_array_equal(images.decode(data[:2] + segment + data[2:]), pixels)
    assert len(encoded.bare(data[:2] + b"\xff\xfe\0\x06abcd" + data[2:])) == len(data)


def test_other_formats_have_no_bare_pixels():
    assert encoded.bare(saved(noise(), "WEBP")) is None
    assert encoded.bare(b"") is None
    assert zlib.crc32(encoded.bare(saved(noise(), "PNG"))) == zlib.crc32(saved(noise(), "PNG"))
