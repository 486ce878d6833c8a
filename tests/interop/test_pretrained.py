"""Trained weights that a config or a workdir names."""

import grain
import jax
import numpy as np
import pytest

from configs import tiny
from vqd_jax import checkpoint
from vqd_jax import config as config_lib
from vqd_jax.errors import UserError
from vqd_jax.interop import pretrained
from vqd_jax.models import conditioned
from vqd_jax.training import stage_two


def test_autoencoder_of_other_sizes_is_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"image_size": 16, "channels": 9}')
    with pytest.raises(UserError, match="channels=9, but config.autoencoder.channels=8"):
        pretrained.load_autoencoder(tiny.get_config(), str(folder))


def test_no_path_is_not_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "autoencoder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert pretrained.find_autoencoder(tiny.get_config(), "run") is None


def test_a_path_may_be_a_workdir_and_the_own_one_comes_first(tmp_path):
    config, own, other = tiny.get_config(), tmp_path / "own", tmp_path / "other"
    (other / "autoencoder").mkdir(parents=True)
    config.autoencoder.path = str(other)
    found = pretrained.find_autoencoder(config, str(own))
    assert found == pretrained.model_folder(str(other))
    (own / "autoencoder" / "model").mkdir(parents=True)
    (own / "autoencoder" / "model" / "config.json").write_text("{}")
    found = pretrained.find_autoencoder(config, str(own))
    assert found == pretrained.model_folder(str(own))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, workdir, averaged parameters) of a run with one checkpoint."""
    workdir, config = tmp_path_factory.mktemp("run"), tiny.get_config()
    made = jax.jit(lambda: stage_two.create_state(config))()
    averaged = jax.tree.map(lambda x: x + 1, made.ema_params)
    checkpoints = checkpoint.Checkpoints(str(workdir / "checkpoints"))
    place = iter(grain.MapDataset.range(3).to_iter_dataset())
    checkpoints.save(7, made.replace(ema_params=averaged), place, config.to_dict())
    checkpoints.close()
    (workdir / "config.json").write_text(config_lib.to_json(config))
    return config, str(workdir), averaged


def initial(config):
    return pretrained.load_initial(
        config, conditioned.abstract_params(config_lib.model_config(config))
    )


def test_a_run_begins_from_the_averages_of_another_workdir(run):
    config, workdir, averaged = run
    config = config.copy_and_resolve_references()
    config.training.init_from = workdir
    config.seed = 5
    jax.tree.map(np.testing.assert_array_equal, initial(config), averaged)
    # A learned null is new, and learnt from the start.
    config.denoiser.learned_null = True
    assert initial(config).keys() == {"denoiser", "text_encoder"}


def test_a_workdir_of_other_sizes_names_the_parameter(run):
    config = run[0].copy_and_resolve_references()
    config.training.init_from = run[1]
    config.text_encoder.context_length = 9
    message = r"text_encoder.position_embedding is \(16, 16\), the config asks for \(9, 16\)"
    with pytest.raises(UserError, match=message):
        initial(config)


def test_an_autoencoder_is_no_model_to_begin_from(tmp_path):
    config = tiny.get_config()
    (tmp_path / "config.json").write_text('{"kind": "autoencoder", "channels": 8}')
    config.training.init_from = str(tmp_path)
    with pytest.raises(UserError, match="neither the folder of a whole model nor the workdir"):
        initial(config)
