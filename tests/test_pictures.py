import numpy as np
from PIL import Image

from vqd_jax import pictures


def test_grid_shows_every_picture_enlarged_above_its_label():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32, 3)).astype(np.uint8)
    grid = np.asarray(pictures.grid(images, ["red heart", ""]))
    assert grid.shape == (8 + 2 * (96 + 26 + 8), 8 + 3 * (96 + 8), 3)
    for row in range(2):
        for column in range(3):
            top, left = 8 + row * 130, 8 + column * 104
            tile = grid[top : top + 96, left : left + 96]
            np.testing.assert_array_equal(tile[1::3, 1::3], images[row, column])
        label = grid[top + 96 : top + 122]
        assert (label < 128).any()


def test_a_long_label_stays_inside():
    images = np.zeros((1, 1, 32, 32, 3), np.uint8)
    grid = np.asarray(pictures.grid(images, ["word " * 60]))
    assert grid.shape[1] == 8 + 96 + 8
    assert (grid[104:, -6:] == 255).all()


def test_masked_cells_are_grey():
    image = np.zeros((4, 4, 3), np.uint8)
    shown = pictures.masked(image, np.array([[True, False], [False, False]]))
    assert (shown[:2, :2] == 160).all()
    assert (shown[2:] == 0).all()


def test_animation_has_all_frames(tmp_path):
    frames = [Image.new("RGB", (8, 8), (i * 40, 0, 0)) for i in range(5)]
    pictures.save_animation(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 5
    assert len(list(tmp_path.iterdir())) == 1
