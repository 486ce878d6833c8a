"""Both stages for models of a class and of nothing, on tiny sets in the publishers' layouts."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import tiny
from vqd_jax import config as config_lib
from vqd_jax import files
from vqd_jax.errors import UserError
from vqd_jax.interop import folder
from vqd_jax.models import conditioned
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.training import stage_two

LAYOUTS = Path(__file__).parents[1] / "data" / "layouts"


def make_config(tmp_path, source, condition):
    shutil.copytree(LAYOUTS / source, tmp_path / "files")
    config = tiny.get_config()
    config.data.dir = str(tmp_path / "files")
    config.autoencoder.num_steps = 2
    config.autoencoder.warmup_steps = 1
    config.autoencoder.batch_size = 2
    config.denoiser.condition = condition
    config.training.num_steps = 3
    config.training.batch_size = 2
    config.training.warmup_steps = 1
    config.training.eval_every = 3
    config.training.log_every = 3
    config.evaluation.num_images = 2
    return config


def last_metrics(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {key: value for row in rows for key, value in row.items()}


@pytest.mark.slow
def test_a_class_conditional_model_is_trained_and_sampled(tmp_path):
    config = make_config(tmp_path, "imagenet", "class")
    config.data.name = "imagenet_class"
    config.denoiser.num_classes = 1000
    config.denoiser.learned_null = True
    config.denoiser.mlp = "conv"
    config.sampling.prompts = ("3", "")
    stage_two.train(config, str(tmp_path / "run"))
    metrics = last_metrics(tmp_path / "run")
    # Of 32 codes: five bits, and what an untrained network believes of noised ones.
    assert 4 < metrics["validation/bits_per_token"] < 20
    assert "validation/bits_per_token_shuffled" in metrics
    model = VQDiffusion.from_workdir(str(tmp_path / "run"))
    assert model.generate([3, 4], num_images=2).pixels.shape == (2, 2, 16, 16, 3)


@pytest.mark.slow
def test_an_unconditional_model_is_trained_and_sampled(tmp_path):
    config = make_config(tmp_path, "ffhq", "none")
    config.data.name = "ffhq_images"
    config.data.max_bad_share = 0.5
    config.sampling.prompts = ("",)
    config.training.batch_size = 1
    config.autoencoder.batch_size = 1
    config.evaluation.num_images = 2
    stage_two.train(config, str(tmp_path / "run"))
    metrics = last_metrics(tmp_path / "run")
    assert 4 < metrics["validation/bits_per_token"] < 20
    assert "validation/bits_per_token_shuffled" not in metrics
    model = VQDiffusion.from_workdir(str(tmp_path / "run"))
    assert model.generate(num_images=3).pixels.shape == (1, 3, 16, 16, 3)


@pytest.fixture
def parts():
    """Config, and parameters that it could have been trained to."""
    config = tiny.get_config()
    config.denoiser.learned_null = True
    sizes = config_lib.model_config(config)
    params = jax.jit(lambda: conditioned.init_params(sizes, jax.random.key(5)))()
    return config, jax.tree.map(np.asarray, params)


def start(config):
    return jax.jit(lambda: stage_two.create_state(config))()


def begin(config, state):
    return stage_two.DenoiserTask(config).begin(state)


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_a_run_begins_from_a_model_folder(parts, tmp_path):
    config, params = parts
    described = {"kind": config_lib.MODEL_KIND, **config.to_dict()}
    folder.save(tmp_path / "whole", described, params)
    config.training.init_from = str(tmp_path / "whole")
    begun = begin(config, start(config))
    assert_equal(begun.params, params)
    assert_equal(begun.ema_params, params)
    # Without a learned null of its own, that one is learnt from the start.
    without = {name: part for name, part in params.items() if name != "null_text"}
    folder.save(tmp_path / "whole", described, without)
    fresh = start(config)
    begun = begin(config, fresh)
    assert_equal(begun.params["denoiser"], params["denoiser"])
    assert_equal(begun.params["null_text"], fresh.params["null_text"])


@pytest.mark.slow
def test_a_pretrained_text_encoder_stays_as_it_is(parts, tmp_path):
    config, params = parts
    folder.save(tmp_path / "clip", {"kind": "clip"}, {"text": params["text_encoder"]})
    config.text_encoder.path = str(tmp_path / "clip")
    fresh = start(config)
    begun = begin(config, fresh)
    assert_equal(begun.params["text_encoder"], params["text_encoder"])
    assert_equal(begun.params["denoiser"], fresh.params["denoiser"])
    batch = {
        "codes": np.zeros((2, 16), np.int32),
        "text_ids": np.array([[49406, 320, 49407] + [0] * 13] * 2, np.int32),
    }
    step = jax.jit(lambda s, b: stage_two.train_step(s, b, config=config))
    moved, _ = step(begun, batch)
    moved, _ = step(moved, batch)
    assert_equal(moved.params["text_encoder"], params["text_encoder"])
    assert_equal(moved.ema_params["text_encoder"], params["text_encoder"])
    kernel = lambda s: s.params["denoiser"]["to_logits"]["kernel"]  # noqa: E731
    assert np.abs(kernel(moved) - kernel(begun)).max() > 0


def test_adapters_alone_learn(parts, tmp_path):
    config, params = parts
    described = {"kind": config_lib.MODEL_KIND, **config.to_dict()}
    folder.save(tmp_path / "whole", described, params)
    config.training.update({"init_from": str(tmp_path / "whole"), "adapter_rank": 2})
    config.training.adapter_paths = r"attention\.(query|value)"
    begun = begin(config, start(config))
    # They change nothing at first.
    assert_equal(begun.frozen, params)
    assert_equal(stage_two.complete(begun, begun.params), params)
    learnt = files.flatten(begun.params)
    wide, blocks = config.denoiser.width, config.denoiser.num_layers
    assert learnt["denoiser.blocks.self_attention.query.kernel.down"].shape == (blocks, wide, 2)
    assert {name.split(".")[-3] for name in learnt} == {"query", "value"}
    assert not any(x.any() for name, x in learnt.items() if name.endswith(".up"))
    # Two moments and an average, of the adapters alone.
    count = sum(x.size for x in learnt.values())
    assert sum(x.size for x in jax.tree.leaves(begun.opt_state)) < 2 * count + 10
    batch = {
        "codes": np.zeros((2, 16), np.int32),
        "text_ids": np.array([[49406, 320, 49407] + [0] * 13] * 2, np.int32),
    }
    step = jax.jit(lambda s, b: stage_two.train_step(s, b, config=config))
    moved = begun
    for _ in range(3):
        moved, _ = step(moved, batch)
    assert_equal(moved.frozen, params)
    whole = stage_two.complete(moved, moved.ema_params)
    for name, old in files.flatten(params).items():
        adapted = f"{name}.up" in learnt
        assert np.array_equal(old, files.flatten(whole)[name]) != adapted, name
        if adapted:
            factors = [files.flatten(moved.ema_params)[f"{name}.{end}"] for end in ("down", "up")]
            expected = old + np.einsum("...ir,...ro->...io", *factors)
            np.testing.assert_allclose(files.flatten(whole)[name], expected, atol=1e-6)


def test_adapters_without_a_kernel_are_refused(parts):
    config, _ = parts
    config.training.update({"init_from": "x", "adapter_rank": 2, "adapter_paths": "nothing"})
    with pytest.raises(UserError, match="adapter_paths='nothing' finds no kernel"):
        start(config)
