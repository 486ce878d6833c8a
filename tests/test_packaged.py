"""The model that comes with the package: it is there, it draws what it is asked for, anywhere."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqd_jax.data import batches, images, sets
from vqd_jax.interop import pretrained
from vqd_jax.pipeline import VQDiffusion

ROOT = Path(__file__).parents[1]
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def model():
    return VQDiffusion.from_pretrained("emoji")


def test_it_draws_the_picture_of_a_caption(model, environment):
    builder = sets.load("emoji_text", environment["TFDS_DATA_DIR"])
    source = batches.records(builder, "train")
    records = [source[i] for i in range(0, len(source), 25)]
    real = np.stack([images.center_crop(r["image"], 64) for r in records]).astype(float)
    wanted = [i for i, record in enumerate(records) if record["category"] == "Food & Drink"][:4]
    prompts = [records[i]["captions"][0] for i in wanted]
    made = model.generate(prompts, num_images=2, seed=0)
    assert made.pixels.shape == (4, 2, 64, 64, 3)
    apart = ((made.pixels[:, :, None] - real) ** 2).mean(axis=(3, 4, 5))
    assert np.mean(apart.argmin(axis=2) == np.array(wanted)[:, None]) >= 0.75


def test_a_prompt_alone_draws(call, tmp_path):
    status, output = call("--prompt=red heart", "--num_images=1", f"--output={tmp_path}/out")
    assert status == 0, output
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["000_red-heart_seed0_00.png", "grid_seed0.png"]
    pixels = np.asarray(Image.open(tmp_path / "out" / names[0])).astype(float)
    # The middle is red and the corners are white.
    assert pixels[28:36, 28:36, 0].mean() > pixels[28:36, 28:36, 1:].mean() + 80
    assert pixels[:4, :4].mean() > 235


def test_its_name_stands_for_a_folder_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = Path(pretrained.located("emoji"))
    assert found.is_absolute() and (found / "config.json").exists()
    assert pretrained.beside("emoji") == Path(".")
    # A folder of this name that is a model comes first.
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji" / "config.json").write_text("{}")
    assert pretrained.located("emoji") == "emoji"
    assert sum(path.stat().st_size for path in found.rglob("*") if path.is_file()) < 25 * MEGABYTE


@pytest.mark.slow
def test_a_wheel_draws_outside_of_a_clone(environment, tmp_path):
    def run(*command, **kwargs):
        done = subprocess.run(command, capture_output=True, text=True, **kwargs)
        assert done.returncode == 0, done.stdout + done.stderr

    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "vqd_jax/assets/emoji/model.safetensors" in names
    run(*pip, "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), str(wheel))
    there = environment | {"PYTHONPATH": str(tmp_path / "site")}
    flags = ("--prompt=red heart", "--num_images=1")
    run(sys.executable, "-m", "vqd_jax.main", *flags, cwd=tmp_path, env=there)
    assert (tmp_path / "samples" / "grid_seed0.png").exists()
