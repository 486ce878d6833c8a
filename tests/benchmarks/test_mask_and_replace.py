"""The study of the replace mass: its schedules, what it exchanges, and what is not done again."""

import jax
import numpy as np
import pytest

from configs import shapes, tiny
from vqd_jax import config as config_lib
from vqd_jax.data.sets import shapes_text
from vqd_jax.interop import pretrained
from vqd_jax.models import conditioned


@pytest.fixture(scope="module")
def script(benchmark):
    return benchmark("mask_and_replace")


def test_a_replace_mass_is_that_of_the_schedule(script):
    base = shapes.get_config()
    keeps = []
    for mass in script.MASKS:
        noise = config_lib.noise_schedule(script.run_config(base, mass, 3))
        # Short by the 9e-6 that are still kept: 2e-4 of 0.05, the smallest above 1e-6.
        replaced = noise.num_codes * np.asarray(noise.replace, np.float64)
        np.testing.assert_allclose(replaced[-1], float(mass), rtol=2e-4, atol=1e-12)
        keeps.append(noise.keep)
    np.testing.assert_array_equal(keeps, np.tile(keeps[:1], (len(keeps), 1)))
    paper = script.run_config(base, "0.1", 3)
    paper.diffusion.update({"schedule": "paper", "keep": (), "mask": ()})
    for mass, other in (("0.1", paper), ("1e-6", base)):
        ours = config_lib.noise_schedule(script.run_config(base, mass, 3))
        theirs = config_lib.noise_schedule(other)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert base.seed == 0


def test_a_tenth_of_every_picture_is_exchanged(script):
    codes = np.random.default_rng(0).integers(0, 7, (5, 64)).astype(np.int32)
    given, wrong = script.exchanged(jax.random.key(0), codes, 7)
    np.testing.assert_array_equal(wrong.sum(1), 6)
    np.testing.assert_array_equal(given != codes, wrong)
    assert given.min() >= 0
    assert given.max() < 7


@pytest.mark.slow
def test_nothing_is_put_right_where_nothing_was_ever_replaced(script):
    base = tiny.get_config()
    base.data.name = "shapes_text"
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 32, (8, 16)).astype(np.int32)
    texts = rng.integers(1, 49000, (8, 16)).astype(np.int32)
    found = {}
    for mass in ("0", "0.2"):
        config = script.run_config(base, mass, 0)
        sizes = config_lib.model_config(config)
        params = jax.jit(lambda: conditioned.init_params(sizes, jax.random.key(0)))()  # noqa: B023
        model = pretrained.Model(config, params, None)
        found[mass] = script.self_correction(model, codes, texts)
    for begun in found["0"].values():
        # Two of sixteen tokens are wrong, and stay so.
        assert (begun["put right"], begun["spoilt"], begun["right"]) == (0, 0, 14 / 16)
    # An untrained network draws any code.
    assert found["0.2"]["1.0"]["spoilt"] > 0.8
    assert list(found["0"]) == ["0.1", "0.25", "0.5", "0.75", "1.0"]


def test_what_is_finished_is_not_done_again(script, tmp_path, capsys):
    study = script.study
    made = study.once(tmp_path / "a" / "b_1.json", lambda: {"x": 1.5})
    assert made["x"] == 1.5 and 0 <= made["seconds"] < 1
    assert study.once(tmp_path / "a" / "b_1.json", lambda: 1 / 0) == made
    study.files.write_json(tmp_path / "a" / "b_1.json", {"x": 1.5, "seconds": 90.0})
    study.files.write_json(tmp_path / "a" / "b_2.json", {"seconds": 60.0})
    # Files of an earlier kind have no time in them.
    study.files.write_json(tmp_path / "a" / "c.json", {"x": 2.0})
    study.print_cost(tmp_path, "b", "c", "")
    told = "2 of b took 2.5 minutes\n0 of c took 0.0 minutes\n2 of all took 2.5 minutes\n"
    assert capsys.readouterr().out == told
    assert study.over_seeds([0.1, 0.2, 0.3], percent=True) == "20.0 ± 5.8"
    assert study.over_seeds([]) == "–"
    assert study.over_seeds([0.25]) == "0.250"


@pytest.mark.slow
def test_true_pictures_are_nearer_to_each_other_than_others_are(script):
    scenes = script.attribute_accuracy.asked(20)[1]
    true = np.stack([np.asarray(shapes_text.render(scene, 32)) for scene in scenes])
    found = script.judged(true)
    assert (found["all"], found["shape"]) == (1, 1)
    # An unbiased distance of a set to itself lies a little below 0.
    assert -0.1 < found["kid"] < 0
    assert script.judged(true[::-1].copy())["kid"] == pytest.approx(found["kid"], abs=1e-6)
    assert script.judged(255 - true)["kid"] > 0.01


def test_everything_is_right_only_if_every_attribute_is(script):
    prompts, scenes = script.attribute_accuracy.asked(3)
    drawn = np.stack([np.asarray(shapes_text.render(scene, 32)) for scene in scenes])
    found = script.attribute_accuracy.scores(drawn, scenes)
    assert found["all"][0] == 1
    found = script.attribute_accuracy.scores(np.roll(drawn, 1, axis=0), scenes)
    assert found["all"][0] == 0
    assert found["count"][0] == 1
    assert len(prompts) == 3
