"""Stage two on tiny files in their publishers' layouts: mixed sets, cached features, buckets."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import tiny
from vqd_jax import config as config_lib
from vqd_jax import modes
from vqd_jax.data import codes
from vqd_jax.errors import UserError
from vqd_jax.interop import folder
from vqd_jax.models import conditioned
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.training import stage_two

LAYOUTS = Path(__file__).parents[1] / "data" / "layouts"
END = 49407


def text_params(config, seed=5):
    sizes = config_lib.model_config(config)
    init = jax.jit(lambda: conditioned.init_params(sizes, jax.random.key(seed)))
    return jax.tree.map(np.asarray, init()["text_encoder"])


@pytest.fixture(scope="module")
def folder_of_all(tmp_path_factory):
    return tmp_path_factory.mktemp("stage_two")


@pytest.fixture(scope="module")
def make_config(folder_of_all):
    """make_config(data set, its layout) -> a config with a pretrained text encoder."""
    clip = folder_of_all / "clip"
    folder.save(clip, {"kind": "clip"}, {"text": text_params(tiny.get_config())})

    def make(name, layout):
        files = folder_of_all / layout
        if not files.exists():
            shutil.copytree(LAYOUTS / layout, files)
        config = tiny.get_config()
        config.data.name = name
        config.data.dir = str(files)
        config.data.max_bad_share = 0.5
        config.autoencoder.num_steps = 2
        config.autoencoder.warmup_steps = 1
        config.autoencoder.batch_size = 2
        config.text_encoder.path = str(clip)
        config.training.num_steps = 4
        config.training.batch_size = 2
        config.training.log_every = config.training.save_every = 1
        config.training.eval_every = 4
        config.evaluation.num_images = 2
        return config

    return make


@pytest.fixture(scope="module")
def coco(make_config, folder_of_all):
    """The workdir of a run, whose checkpoints are elsewhere, and its config."""
    config = make_config("coco_text", "coco")
    config.training.checkpoints = str(folder_of_all / "elsewhere")
    workdir = folder_of_all / "coco_run"
    stage_two.train(config, str(workdir))
    return workdir, config


def losses(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.mark.slow
def test_cached_features_train_like_computed_ones(coco, make_config, tmp_path):
    config = make_config("coco_text", "coco")
    config.autoencoder.path = str(coco[0])
    config.data.cache_text_features = True
    stage_two.train(config, str(tmp_path / "cached"))
    # They are kept as float16.
    computed = losses(coco[0])
    assert list(computed) == [1, 2, 3, 4]
    assert losses(tmp_path / "cached") == pytest.approx(computed, rel=1e-4)
    # The rounding shows that they were used.
    assert losses(tmp_path / "cached") != computed
    cache = codes.open_split(str(tmp_path / "cached" / "codes" / "train"))
    assert cache.feature_width == config.text_encoder.width
    # Another text encoder would not have made them.
    folder.save(
        tmp_path / "other", {"kind": "clip"}, {"text": text_params(tiny.get_config(), seed=6)}
    )
    config.text_encoder.path = str(tmp_path / "other")
    config.data.codes = str(tmp_path / "cached" / "codes")
    with pytest.raises(UserError, match="text_encoder is"):
        stage_two.train(config, str(tmp_path / "refused"))


@pytest.mark.slow
def test_a_learned_null_stands_in_for_cached_features_of_no_text(make_config):
    config = make_config("coco_text", "coco")
    config.denoiser.learned_null = True
    sizes = config_lib.model_config(config)
    params = jax.jit(lambda: conditioned.init_params(sizes, jax.random.key(1)))()
    model = conditioned.bind(sizes, params)
    ids = np.array([[END - 1, END] + [0] * 14, [END - 1, 320, END] + [0] * 13], np.int32)
    encoded = model.text_encoder(ids)
    features = model.text_features(ids, encoded)
    np.testing.assert_array_equal(features, model.text_features(ids))
    np.testing.assert_array_equal(features[0], params["null_text"])
    np.testing.assert_array_equal(features[1], encoded[1])


def test_features_that_are_trained_are_not_cached(make_config):
    config = make_config("coco_text", "coco")
    config.data.cache_text_features = True
    config.text_encoder.path = ""
    with pytest.raises(UserError, match="config.text_encoder.path"):
        config_lib.validate(config)
    config = make_config("coco_text", "coco")
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))
    assert sorted(stage_two.abstract_batch(config, mesh)) == ["codes", "text_ids"]
    config.data.cache_text_features = True
    config_lib.validate(config)
    abstract = stage_two.abstract_batch(config, mesh)
    assert sorted(abstract) == ["codes", "text_features", "text_ids"]
    assert abstract["text_features"].shape == (2, 16, 16)


@pytest.mark.slow
def test_further_codes_are_mixed_in_by_weight(coco, make_config, tmp_path, monkeypatch):
    first = make_config("image_text_folder", "jsonl")
    first.autoencoder.path = str(coco[0])
    modes.encode(first, str(tmp_path / "first"))
    config = make_config("coco_text", "coco")
    config.autoencoder.path = str(coco[0])
    config.data.more_codes = (str(tmp_path / "first" / "codes"),)
    config.data.weights = (1.0,)
    with pytest.raises(UserError, match="config.data.weights"):
        config_lib.validate(config)
    config.data.weights = (1.0, 3.0)
    config_lib.validate(config)
    taken = []
    make = stage_two.batches.code_dataset

    def spied(sources, *args, **options):
        taken.append(([source.folder for source in sources], options["weights"]))
        return make(sources, *args, **options)

    monkeypatch.setattr(stage_two.batches, "code_dataset", spied)
    stage_two.train(config, str(tmp_path / "run"))
    folders = [tmp_path / "run" / "codes" / "train", tmp_path / "first" / "codes" / "train"]
    assert taken == [(folders, (1.0, 3.0))]
    assert len(losses(tmp_path / "run")) == 4


@pytest.mark.slow
def test_a_run_inside_its_data_goes_on_when_both_have_moved(coco, make_config, tmp_path):
    config = make_config("image_text_folder", "jsonl")
    config.autoencoder.path = str(coco[0])
    config.sampling.num_steps = 2

    def train(place, num_steps):
        config.data.dir, config.training.num_steps = str(place), num_steps
        stage_two.train(config, str(place / "run"))
        codes = (place / "run" / "codes").rglob("*")
        return {path.relative_to(place): path.stat().st_mtime_ns for path in codes}

    first = Path(shutil.copytree(LAYOUTS / "jsonl", tmp_path / "first"))
    made = train(first, 2)
    # The run's own pictures stand among the data now.
    assert list((first / "run").rglob("*.png"))
    second = first.rename(tmp_path / "second")
    assert train(second, 3) == made
    (tmp_path / "third").symlink_to(second)
    assert train(tmp_path / "third", 4) == made
    assert list(losses(second / "run")) == [1, 2, 3, 4]


def test_mistakes_are_told_before_anything_is_made(make_config, tmp_path):
    config = make_config("coco_text", "coco")
    for field, value, told in (
        ("data.more_codes", (str(tmp_path / "none"),), "has no cached codes"),
        ("training.checkpoints", config.text_encoder.path + "/config.json", "cannot be written"),
        ("autoencoder.codebook_size", 64, "of autoencoders with a remap"),
        ("autoencoder.path", str(tmp_path / "none"), "none"),
    ):
        wrong = config.copy_and_resolve_references()
        wrong.update_from_flattened_dict({field: value})
        with pytest.raises(UserError, match=told):
            stage_two.train(wrong, str(tmp_path / "run"))
        assert not (tmp_path / "run" / "autoencoder").exists()
        assert not (tmp_path / "run" / "config.json").exists()
    config.data.weights = (-1.0,)
    with pytest.raises(UserError, match="config.data.weights"):
        config_lib.validate(config)


def test_checkpoints_live_where_the_config_says(coco, folder_of_all, tmp_path):
    workdir, config = coco
    assert not (workdir / "checkpoints").exists()
    assert sorted(p.name for p in (folder_of_all / "elsewhere").iterdir()) == ["3", "4"]
    model = VQDiffusion.from_workdir(str(workdir))
    assert model.generate("a dog").pixels.shape == (1, 1, 16, 16, 3)
    # They belong to the run as if they were in its workdir.
    config = config.copy_and_resolve_references()
    config.denoiser.width = 64
    for other in (workdir, tmp_path / "another"):
        with pytest.raises(UserError, match="denoiser.width: 32 -> 64"):
            stage_two.train(config, str(other))
