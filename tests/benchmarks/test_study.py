"""A study goes on with its own settings and refuses others."""

import json

import pytest

from vqd_jax.errors import UserError


def begun(script, tmp_path, *changes):
    (tmp_path / "tokenizer" / "codes" / "validation").mkdir(parents=True, exist_ok=True)
    (tmp_path / "tokenizer" / "codes" / "validation" / "manifest.json").touch()
    flags = [f"--workdir={tmp_path}", f"--tokenizer={tmp_path}/tokenizer"]
    flags += [f"--set={change}" for change in changes]
    return script.begin(script.parser("").parse_args(flags))


def test_a_study_goes_on_although_a_field_is_new(benchmark, tmp_path):
    script = benchmark("study")
    begun(script, tmp_path, "training.num_steps=7")
    kept = tmp_path / "study.json"
    settings = json.loads(kept.read_text())
    assert settings.pop("distil.num_steps") == 4
    kept.write_text(json.dumps(settings))
    config = begun(script, tmp_path, "training.num_steps=7")
    assert config.training.num_steps == config.training.eval_every == 7
    assert json.loads(kept.read_text())["distil.num_steps"] == 4


def test_a_study_refuses_other_settings(benchmark, tmp_path):
    script = benchmark("study")
    begun(script, tmp_path, "training.num_steps=7")
    with pytest.raises(UserError, match="training.num_steps: 7 -> 8"):
        begun(script, tmp_path, "training.num_steps=8")
