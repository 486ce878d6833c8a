import collections
import io
import itertools
import pathlib
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFont, ImageOps

from vqd_jax.data import images, masks
from vqd_jax.errors import UserError

BAD = pathlib.Path(__file__).parent / "layouts" / "bad" / "images"
READABLE = {
    "good.jpg": (80, 96),
    "cmyk.jpg": (80, 96),
    "gray.jpg": (80, 96),
    "gray16.png": (80, 96),
    "palette_alpha.png": (80, 96),
    "exif_rotated.jpg": (80, 96),
}
UNREADABLE = {
    "truncated.jpg": "truncated",
    "zero_byte.jpg": "empty",
    "not_an_image.jpg": "not an image",
}


def encoded(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(height, width, seed=0):
    """Smooth random colours, so that resizing has something to say and JPEG little to lose."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def test_every_file_is_readable_or_not():
    assert READABLE.keys() | UNREADABLE.keys() == {p.name for p in BAD.iterdir()}


@pytest.mark.parametrize("name", READABLE)
def test_unusual_files_are_read(name):
    image = images.decode((BAD / name).read_bytes())
    assert image.shape == (*READABLE[name], 3)
    assert image.dtype == np.uint8
    # All show an animal on white or on something pale.
    assert image[0, 0].min() > 200
    assert image.min() < 100


@pytest.mark.parametrize("name", UNREADABLE)
def test_broken_files_are_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=UNREADABLE[name]):
        images.decode((BAD / name).read_bytes())


def test_sixteen_bits_are_scaled():
    values = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    data = encoded(Image.fromarray(values))
    expected = np.array([0, 0, 1, 128, 255])
    np.testing.assert_array_equal(images.decode(data), expected[None, :, None].repeat(3, 2))
    deep = Image.fromarray(values.astype(np.int32))
    np.testing.assert_array_equal(images.decode(encoded(deep, "tiff"))[..., 0], expected[None])
    path = BAD / "gray16.png"
    stored = np.asarray(Image.open(path)).astype(float)
    assert stored.max() == 65535
    np.testing.assert_allclose(
        images.decode(path.read_bytes())[..., 0], stored * 255 / 65535, atol=0.5001
    )


def test_unknown_ranges_are_refused():
    for values in (np.float32([[0.5]]), np.int32([[70000]]), np.int32([[-1]])):
        with pytest.raises(ValueError, match="white is unknown"):
            images.decode(encoded(Image.fromarray(values), "tiff"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_composited_on_white(mode):
    grey = np.array([[[100, 100, 100, alpha] for alpha in (0, 128, 255)]], np.uint8)
    data = encoded(Image.fromarray(grey, "RGBA").convert(mode), "tiff" if mode == "PA" else "png")
    expected = [255, 255 - round(155 * 128 / 255), 100]
    np.testing.assert_allclose(images.decode(data)[0, :, 0], expected, atol=1)


def test_a_transparent_colour_is_white():
    image = Image.new("L", (2, 1), 7)
    image.putpixel((1, 0), 50)
    pixels = images.decode(encoded(image, transparency=7))
    np.testing.assert_array_equal(pixels[0], [[255] * 3, [50] * 3])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_modes_keep_their_colour(mode):
    image = Image.new("RGB", (3, 2), (255, 255, 255)).convert(mode)
    kind = "tiff" if mode == "CMYK" else "png"
    assert (images.decode(encoded(image, kind)) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation):
    # Pillow's own function is the reference, on pixels that all differ.
    image = Image.fromarray(np.arange(12 * 3, dtype=np.uint8).reshape(4, 3, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(images.decode(data), expected)


def test_damaged_exif_does_not_cost_the_picture():
    data = encoded(picture(8, 8), "jpeg", exif=b"Exif\0\0II*\0" + b"\xff" * 20)
    assert images.decode(data).shape == (8, 8, 3)


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_decompression_bombs_are_refused():
    for side in (12_000, 30_000):
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
        body = zlib.compress(bytes(side * (side // 8 + 1)))
        bomb = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
        assert len(bomb) < 200_000
        with pytest.raises(ValueError, match="pixels"):
            images.decode(bomb)


def test_formats_that_run_programs_are_not_opened():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(ValueError, match="not an image of a known format"):
        images.decode(eps)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_cut_anywhere_is_found_also_at_the_smallest_scale(progressive):
    data = encoded(picture(64, 48), "jpeg", quality=80, progressive=progressive)
    # The last bytes hold no pixel.
    for length in range(0, len(data) - 2, 7):
        for min_side in (0, 1):
            with pytest.raises(ValueError):
                images.decode(data[:length], min_side)


def test_reduced_jpegs_are_close_and_large_enough():
    image = picture(512, 768)
    data = encoded(image, "jpeg", quality=95)
    reduced = images.decode(data, min_side=128)
    assert reduced.shape == (128, 192, 3)
    full = np.asarray(
        Image.fromarray(images.decode(data)).resize((192, 128), Image.Resampling.BOX), int
    )
    assert np.abs(reduced - full).mean() < 1
    assert images.decode(data, min_side=129).shape == (256, 384, 3)
    assert images.decode(data, min_side=600).shape == (512, 768, 3)
    # Other formats have one size.
    assert images.decode(encoded(image), min_side=16).shape == (512, 768, 3)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_have_the_pixels_that_pillow_gives(subsampling, progressive):
    data = encoded(picture(75, 110), "jpeg", subsampling=subsampling, progressive=progressive)
    np.testing.assert_array_equal(images.decode(data), np.asarray(Image.open(io.BytesIO(data))))
    for min_side in (37, 18, 9, 1):
        image = Image.open(io.BytesIO(data))
        image.draft(None, (min_side, min_side))
        np.testing.assert_array_equal(images.decode(data, min_side), np.asarray(image))


def test_damage_that_pillow_bears_is_borne():
    data = encoded(picture(32, 32), "jpeg")
    # Bytes between two segments, which belong to neither.
    start = data.index(b"\xff\xdb")
    stray = data[:start] + b"\x00" * 9 + data[start:]
    np.testing.assert_array_equal(images.decode(stray), images.decode(data))


def test_center_crop_is_short_side_then_centre():
    image = picture(60, 91)
    resized = image.resize((16 * 91 // 60, 16), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((4, 0, 20, 16)), int)
    found = images.center_crop(np.asarray(image), 16)
    assert (found.shape, found.dtype) == ((16, 16, 3), np.uint8)
    assert np.abs(found - expected).max() <= 1
    upright = np.asarray(image.transpose(Image.Transpose.TRANSPOSE))
    np.testing.assert_allclose(images.center_crop(upright, 16), found.swapaxes(0, 1), atol=1)


def test_center_crop_of_the_right_size_is_the_image():
    image = np.asarray(picture(16, 16))
    assert images.center_crop(image, 16) is image


def test_resizing_is_antialiased():
    # One pixel in four is white: without a filter every pixel would be 0 or 255.
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::4] = 255
    for crop in (images.center_crop(stripes, 16), images.random_crop(stripes, 16, [0] * 5)):
        assert abs(crop[4:-4, 4:-4].mean() - 255 / 4) < 8
        assert crop[4:-4, 4:-4].max() < 130


def test_random_crop_equals_the_steps_one_by_one():
    image = picture(90, 140)
    for seed in range(20):
        uniforms = np.random.default_rng(seed).uniform(size=images.NUM_UNIFORMS)
        top, left, side, scaled, inner_top, inner_left = images.crop_geometry(90, 140, 32, uniforms)
        square = image.crop((left, top, left + side, top + side))
        resized = np.asarray(square.resize((scaled, scaled), Image.Resampling.BICUBIC), int)
        expected = resized[inner_top : inner_top + 32, inner_left : inner_left + 32]
        found = images.random_crop(np.asarray(image), 32, uniforms)
        assert (found.shape, found.dtype) == ((32, 32, 3), np.uint8)
        assert np.abs(found - expected).max() <= 1


def grid(number):
    """`number` equally likely uniforms, the middles of equal cells."""
    return (np.arange(number) + 0.5) / number


def test_distribution_of_the_first_square_is_exact():
    # h - s = 40: offsets 15 .. 24, never the far ends.
    found = collections.Counter(
        images.crop_geometry(60, 100, 32, [0.3, u, 0, 0, 0])[:3] for u in grid(1000)
    )
    assert found == {(0, left, 60): 100 for left in range(15, 25)}
    found = collections.Counter(
        images.crop_geometry(100, 60, 32, [u, 0.3, 0, 0, 0])[:3] for u in grid(1000)
    )
    assert found == {(top, 0, 60): 100 for top in range(15, 25)}


@pytest.mark.parametrize(
    ("long", "offsets"), [(60, [0]), (61, [0]), (62, [0]), (64, [1]), (68, [3, 4]), (69, [3, 4])]
)
def test_small_margins_have_the_published_offsets(long, offsets):
    # floor(3 m / 8) up to but without floor(5 m / 8), at least one of them.
    found = {images.crop_geometry(60, long, 32, [0, u, 0, 0, 0])[1] for u in grid(64)}
    assert sorted(found) == offsets


@pytest.mark.parametrize(
    ("side", "sides"),
    [(500, range(256, 289)), (270, range(256, 271)), (256, [256]), (100, [256])],
)
def test_distribution_of_the_side_is_exact(side, sides):
    number = 40 * len(sides)
    found = collections.Counter(
        images.crop_geometry(side, side, 256, [0, 0, u, 0, 0])[3] for u in grid(number)
    )
    assert found == dict.fromkeys(sides, 40)


def test_distribution_of_the_second_square_is_exact():
    # Side 34 for a crop of 32: three offsets each way, all nine pairs alike.
    third = 2.5 / 5  # of the sides 32 .. 36
    found = collections.Counter(
        images.crop_geometry(99, 99, 32, [0, 0, third, u, v])[3:]
        for u, v in itertools.product(grid(30), repeat=2)
    )
    assert found == {(34, y, x): 100 for y in range(3) for x in range(3)}


def test_uniforms_at_the_ends_stay_in_the_support():
    for u in (0.0, np.nextafter(1, 0)):
        top, left, side, scaled, y, x = images.crop_geometry(480, 640, 256, [u] * 5)
        assert 0 <= left <= 640 - side and top == 0
        assert 0 <= y == x <= scaled - 256
        image = np.asarray(picture(480, 640))
        assert images.random_crop(image, 256, [u] * 5).shape == (256, 256, 3)


def test_small_images_are_enlarged():
    for shape in ((5, 9), (1, 1), (1, 40)):
        image = np.asarray(picture(*shape))
        assert images.random_crop(image, 32, [0.9] * 5).shape == (32, 32, 3)
        assert images.center_crop(image, 32).shape == (32, 32, 3)


def test_other_arguments_are_refused():
    image = np.zeros((8, 8, 3), np.uint8)
    for wrong in (image[..., :1], image[0], image.astype(np.float32)):
        with pytest.raises(ValueError, match="must be uint8"):
            images.center_crop(wrong, 4)
        with pytest.raises(ValueError, match="must be uint8"):
            images.random_crop(wrong, 4, [0] * 5)
    for uniforms in ([0] * 4, [0, 0, 0, 0, 1.0], [0, 0, 0, 0, -0.1]):
        with pytest.raises(ValueError, match="numbers in"):
            images.random_crop(image, 4, uniforms)


def test_flip_exchanges_left_and_right():
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    flipped = images.flip(image)
    np.testing.assert_array_equal(flipped, image[:, ::-1])
    np.testing.assert_array_equal(images.flip(flipped), image)


def test_captions_that_name_a_side_forbid_the_flip():
    assert images.may_flip([])
    assert images.may_flip(["A bright red copyright sign.", "a cat"])
    for text in ("on the LEFT.", "a left-hand turn", "turn (right)", "the leftmost cup", "Right!"):
        assert not images.may_flip(["a cat", text])


@pytest.mark.parametrize("name", [*READABLE, "transparent.png"])
def test_a_picture_of_pillow_is_read_as_its_file_is(name, tmp_path):
    path = BAD / name
    if name == "transparent.png":
        half = np.zeros((8, 8, 4), np.uint8)
        half[4:, :, 3] = 255
        Image.fromarray(half).save(path := tmp_path / name)
    loaded = images.load(path)
    side = min(loaded.size)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(images.square(opened, side), images.square(loaded, side))


def test_a_picture_of_an_unknown_range_is_refused():
    for read in (lambda image: images.square(image, 1), masks.read):
        with pytest.raises(UserError, match="white is unknown"):
            read(Image.fromarray(np.float32([[0.5]])))


def test_a_file_that_is_no_picture_is_named():
    for name in ("truncated.jpg", "nothing.jpg"):
        with pytest.raises(UserError, match=f"{name} cannot be read as a picture"):
            images.load(BAD / name)


def _there(name):
    try:
        return bool(ImageFont.truetype(name, 15))
    except OSError:
        return False


@pytest.mark.skipif(
    not any(map(_there, images._FONTS)), reason="this machine has no font but Pillow's own"
)
def test_a_label_is_drawn_in_a_font_that_has_its_letters():
    own = ImageFont.load_default(15)
    assert images._font("red heart, 12!").getname() == own.getname()
    assert not images._has_letters(own, "caf\u00e9")
    font = images._font("caf\u00e9")
    assert font.getname() != own.getname() and images._has_letters(font, "caf\u00e9")


def test_letters_that_no_font_has_are_told(caplog):
    shown = images.grid(np.zeros((1, 1, 32, 32, 3), np.uint8), ["red \U000ffffd"])
    assert shown.size[0] > 32
    assert "every letter of 'red " in caplog.text


def test_grid_shows_every_picture_enlarged_above_its_label():
    shown = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32, 3)).astype(np.uint8)
    sheet = np.asarray(images.grid(shown, ["red heart", ""]))
    assert sheet.shape == (8 + 2 * (96 + 26 + 8), 8 + 3 * (96 + 8), 3)
    for row in range(2):
        for column in range(3):
            top, left = 8 + row * 130, 8 + column * 104
            tile = sheet[top : top + 96, left : left + 96]
            np.testing.assert_array_equal(tile[1::3, 1::3], shown[row, column])
        label = sheet[top + 96 : top + 122]
        assert (label < 128).any()


def test_a_long_label_stays_inside():
    sheet = np.asarray(images.grid(np.zeros((1, 1, 32, 32, 3), np.uint8), ["word " * 60]))
    assert sheet.shape[1] == 8 + 96 + 8
    assert (sheet[104:, -6:] == 255).all()


def test_masked_cells_are_grey():
    image = np.zeros((4, 4, 3), np.uint8)
    shown = images.masked(image, np.array([[True, False], [False, False]]))
    assert (shown[:2, :2] == 160).all()
    assert (shown[2:] == 0).all()


def test_animation_has_all_frames(tmp_path):
    frames = [Image.new("RGB", (8, 8), (i * 40, 0, 0)) for i in range(5)]
    images.save_animation(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 5
    assert len(list(tmp_path.iterdir())) == 1


def test_reading_pictures_imports_no_library_of_training():
    code = "import sys, vqd_jax.data.images; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"jax", "grain", "orbax", "tensorflow_datasets"} & set(found)
