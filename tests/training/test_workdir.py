"""Which config a workdir takes, and where it looks for its checkpoints."""

import shutil

import grain
import jax.numpy as jnp
import pytest

from configs import tiny
from vqd_jax import checkpoint
from vqd_jax.errors import UserError
from vqd_jax.training.workdir import claim


@pytest.fixture
def elsewhere(tmp_path):
    """The config of a run in ``tmp_path/run`` that keeps its checkpoints elsewhere."""
    config = tiny.get_config()
    config.training.checkpoints = str(tmp_path / "elsewhere")
    with claim(config, str(tmp_path / "run")):
        saved = checkpoint.Checkpoints(config.training.checkpoints)
        data = iter(grain.MapDataset.range(2).to_iter_dataset())
        saved.save(5, {"step": jnp.int32(5)}, data, config.to_dict())
        saved.close()
    return config


def test_a_run_does_not_begin_anew_because_the_place_of_its_checkpoints_is_not_given(
    elsewhere, tmp_path
):
    given = elsewhere.training.checkpoints
    for other in ("", str(tmp_path / "third")):
        config = elsewhere.copy_and_resolve_references()
        config.training.checkpoints = other
        with pytest.raises(UserError, match=f"are in {given}, .*Give the old folder again"):
            with claim(config, str(tmp_path / "run")):
                pass
    with claim(elsewhere, str(tmp_path / "run")):
        pass


def test_checkpoints_may_be_copied_to_another_place(elsewhere, tmp_path):
    shutil.copytree(elsewhere.training.checkpoints, tmp_path / "run" / "checkpoints")
    elsewhere.training.checkpoints = ""
    with claim(elsewhere, str(tmp_path / "run")):
        pass
    assert checkpoint.exist(elsewhere, str(tmp_path / "run"))


def test_two_runs_do_not_share_a_workdir(tmp_path):
    config = tiny.get_config()
    with claim(config, str(tmp_path)):
        with pytest.raises(UserError, match="another run is at work"):
            with claim(config, str(tmp_path)):
                pass


def test_a_run_does_not_write_among_its_pictures(tmp_path):
    config = tiny.get_config()
    config.data.name, config.data.dir = "image_text_folder", f"{tmp_path}/"
    with pytest.raises(UserError, match="is the data directory"), claim(config, str(tmp_path)):
        pass
    assert not list(tmp_path.iterdir())
    with claim(config, str(tmp_path / "run")):
        assert (tmp_path / "run/config.json").exists()
