"""Models, runs, caches and prepared data of commit 3c677fe still serve."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from absl.testing import flagsaver

from vqd_jax import config as config_lib
from vqd_jax import main
from vqd_jax.data import encode
from vqd_jax.interop import pretrained
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.training import stage_two

HERE = Path(__file__).parent


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The folder in which ``make_old_run.py`` ran; paths in configs are relative to it."""
    with tarfile.open(HERE / "run_3c677fe.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    shutil.copytree(HERE.parent / "data" / "layouts" / "imagenet", tmp_path / "files")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_draws_the_same(model, old):
    with np.load(old / "drawn.npz") as drawn:
        made = model.generate([3, 999], num_images=2, seed=1, rule="purity")
        np.testing.assert_array_equal(made.codes, drawn["purity_codes"])
        # Rounding may differ by a level between versions of the compiler.
        np.testing.assert_allclose(
            made.pixels.astype(int), drawn["purity_pixels"].astype(int), atol=1
        )


@pytest.mark.slow
def test_a_model_folder_draws_the_same_pictures(old):
    model = VQDiffusion.from_pretrained("model")
    assert_draws_the_same(model, old)
    # An ordinary chain begins from the schedule's law now; it began all masked.
    with np.load(old / "drawn.npz") as drawn:
        made = model.generate([3, 999], num_images=2, seed=1, rule="ordinary", start="masked")
        np.testing.assert_array_equal(made.codes, drawn["ordinary_codes"])


def test_a_run_draws_the_same_pictures_and_goes_on(old):
    assert_draws_the_same(VQDiffusion.from_workdir("run"), old)
    config = config_lib.load("run/config.json")
    config.training.num_steps = 5
    made = Path("made/imagenet_class/1.0.0")
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    codes = Path("run/codes/train/manifest.json").read_bytes()
    stage_two.train(config, "run")
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5]
    # Nothing was made anew.
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before
    assert Path("run/codes/train/manifest.json").read_bytes() == codes


def test_a_cache_of_codes_and_captions_opens(old):
    config = config_lib.load("captions/config.json")
    params = pretrained.load_autoencoder(config, pretrained.model_folder("run"))
    content = encode.content(config)
    cached = encode.open_split(config, "captions/codes", "train", params, content)
    assert len(cached) == 12
    record = cached.read([0])[0]
    assert record.codes.shape == (1, 16) and record.codes.max() < 8
    assert record.text_ids[0, 0] == 49406


def test_a_run_becomes_a_model_folder(old):
    main.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(mode="export", model="run", target="out", format="vqd_jax"):
        main.main(["vqd_jax"])
    assert_draws_the_same(VQDiffusion.from_pretrained("out"), old)
    assert (
        Path("out/model.safetensors").read_bytes() == Path("model/model.safetensors").read_bytes()
    )
