"""The best model is kept; what decides it is measured of pictures of held-out captions."""

import json

import pytest
from ml_collections import ConfigDict

from vqd_jax.data import encode
from vqd_jax.errors import UserError
from vqd_jax.evaluation.progress import Progress
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.training import best


def told(folder):
    return json.loads((folder / "best.json").read_text())


def test_the_best_of_earlier_steps_stays(tiny_model, tmp_path):
    def keep(step, value, metric="validation/kid"):
        best.keep(str(tmp_path), metric, step, {metric: value}, tiny_model)
        return told(tmp_path)["step"]

    assert [keep(10, 0.5), keep(20, 0.6), keep(30, 0.4), keep(40, 0.4)] == [10, 10, 30, 30]
    # A run that goes on from step 20 does step 30 again: what was later does not count.
    assert keep(25, 0.45) == 25
    loaded = VQDiffusion.from_pretrained(str(tmp_path / "best"))
    assert loaded.fingerprint() == tiny_model.fingerprint()
    # Another metric, of which more is better.
    assert [keep(50, 0.3, "validation/coverage"), keep(60, 0.2, "validation/coverage")] == [50, 50]
    assert keep(70, 0.35, "validation/coverage") == 70


def test_pictures_are_measured_on_the_way(tiny_model, tmp_path, environment, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", environment["TFDS_DATA_DIR"])
    tiny_model.save_pretrained(str(tmp_path / "model"))
    model = VQDiffusion.from_pretrained(str(tmp_path / "model"))
    config = model.config
    config.training.update(evaluate_with="random", evaluate_pictures=16)
    config.sampling.num_steps = 2
    progress = Progress(config, encode.data_set(config), str(tmp_path))
    found = progress.measure(model)
    assert found == progress.measure(model)
    # An untrained model is far from the pictures.
    assert found["validation/kid"] > 5 * found["validation/kid_error"] > 0
    assert 0 <= found["validation/coverage"] < 0.5
    assert "validation/attributes" not in found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"evaluate_with": "none"}, "evaluate_with='none'"),
        ({"best_metric": "fid"}, "best_metric='fid'"),
        ({"best_metric": "validation/kid"}, "needs evaluate_with"),
    ],
)
def test_impossible_values_are_told(tiny_model, fields, message):
    from vqd_jax import config as config_lib

    config = ConfigDict(tiny_model.config.to_dict())
    config.training.update(fields)
    with pytest.raises(UserError, match=message):
        config_lib.validate(config)
