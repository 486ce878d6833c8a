import importlib
import json

import jax
import numpy as np
import pytest

from configs import tiny
from vqd_jax import config as config_lib
from vqd_jax.diffusion import schedule
from vqd_jax.errors import UserError
from vqd_jax.training import stage_two, tokenizer

CONFIGS = ("emoji", "shapes", "tiny")


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_valid_and_its_states_can_be_built(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config_lib.validate(config)
    sizes, options = config_lib.autoencoder_config(config), config_lib.autoencoder_options(config)
    one = jax.eval_shape(lambda: tokenizer.create_state(sizes, options, jax.random.key(0)))
    two = jax.eval_shape(lambda: stage_two.create_state(config))
    assert one.codebook.codebook.shape == (sizes.num_codes, sizes.codebook_dim)
    rows = two.params["denoiser"]["code_embedding"]["embedding"].shape[0]
    assert rows == config.autoencoder.num_codes + 1
    assert two.time_statistics.visits.shape == (config.diffusion.num_steps,)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_json(name, tmp_path):
    config = importlib.import_module(f"configs.{name}").get_config()
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    again = config_lib.load(str(tmp_path / "config.json"))
    assert config_lib.flatten(again) == config_lib.flatten(config)
    assert config_lib.differences(config, again) == []
    config_lib.validate(again)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.image_size", 18, "config.data.image_size=18: must be a multiple of 4"),
        ("autoencoder.num_codes", 1, "num_codes=1: must be at least 2"),
        ("autoencoder.num_codes", 70000, "num_codes=70000: must be at most 65536"),
        ("autoencoder.channels", 12, "channels=12: must be a multiple of norm_groups=8"),
        ("denoiser.num_heads", 3, "denoiser.width=32 is not divisible by denoiser.num_heads=3"),
        ("denoiser.dtype", "float16", "denoiser.dtype='float16': must be one of float32, bfloat16"),
        ("autoencoder.decoder_only", True, "decoder_only=True: name the trained tokenizer with"),
        ("data.balance_power", 1.5, "config.data.balance_power=1.5: must lie in 0..1"),
        ("autoencoder.warmup_steps", -1, "config.autoencoder.warmup_steps=-1: must be at least 0"),
        ("denoiser.scan_unroll", 0, "config.denoiser.scan_unroll=0: must be at least 1"),
        ("denoiser.remat", "some", "denoiser.remat='some': must be one of none, dots, full"),
        ("text_encoder.vocab_size", 1000, "vocab_size=1000: must be at least 49408"),
        ("text_encoder.width", 0, "config.text_encoder.width=0: must be at least 1"),
        ("mesh.fsdp", -2, "config.mesh.fsdp=-2: must be at least 1, or -1"),
        ("diffusion.schedule", "sigmoid", "must be one of released, paper, cosine"),
        ("diffusion.keep", (0.9,), "config.diffusion.keep=(0.9,): must be two probabilities"),
        ("diffusion.mask", (0.9, 0.1), "config.diffusion: "),
        ("diffusion.num_steps", 0, "diffusion.num_steps=0: must be at least 1"),
        ("training.num_steps", 0, "training.num_steps=0: must be at least 1"),
        ("training.learning_rate", 0.0, "training.learning_rate=0.0: must be positive"),
        ("training.learning_rate", float("nan"), "training.learning_rate=nan"),
        ("training.null_text_rate", 1.5, "null_text_rate=1.5: must lie in 0..1"),
        ("sampling.num_steps", 11, "must not exceed config.diffusion.num_steps=10"),
        ("seed", -1, "seed=-1: must be at least 0"),
        ("seed", 2**32, "seed=4294967296: must be at least 0 and below"),
        ("data.name", "mnist", "data.name='mnist': must be one of emoji_text, shapes_text"),
        ("training.adam_b2", 1.0, "adam_b2=1.0: must be at least 0 and below 1"),
        ("autoencoder.learning_rate", float("nan"), "autoencoder.learning_rate=nan"),
        ("sampling.rule", "best", "sampling.rule='best': must be one of ordinary"),
        ("sampling.prompts", (), "sampling.prompts: give at least one text"),
    ],
)
def test_impossible_value_is_an_error_that_names_the_key(key, value, message):
    config = tiny.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match="config") as error:
        config_lib.validate(config)
    assert message in str(error.value)


def test_a_config_chooses_the_noise():
    config = tiny.get_config()
    cosine = schedule.cosine(10, 32)
    config.diffusion.schedule = "cosine"
    np.testing.assert_array_equal(config_lib.noise_schedule(config).mask, cosine.mask)
    config.diffusion.keep = (0.9, 0.0)
    with pytest.raises(UserError, match="a cosine schedule has no others"):
        config_lib.validate(config)
    config.diffusion.schedule = "paper"
    made = config_lib.noise_schedule(config)
    np.testing.assert_array_equal(
        made.keep, schedule.linear(10, 32, (0.9, 0.0), schedule.PAPER_MASK).keep
    )
    np.testing.assert_array_equal(made.mask, schedule.paper(10, 32).mask)
    assert not config_lib.has_released_schedule(config)
    assert config_lib.has_released_schedule(tiny.get_config())


def test_a_config_from_before_a_field_was_there_has_its_default():
    stored = json.loads(config_lib.to_json(tiny.get_config()))
    del stored["diffusion"]["keep"], stored["diffusion"]["mask"]
    config = config_lib.from_dict(stored | {"kind": "vqd_jax"}, "a run")
    assert config_lib.flatten(config) == config_lib.flatten(tiny.get_config())


def test_differences_name_what_may_not_change():
    old, new = tiny.get_config(), tiny.get_config()
    new.training.num_steps, new.sampling.num_steps = 80, 5
    assert config_lib.differences(old, new) == []
    new.training.batch_size = 7
    assert config_lib.differences(old, new) == ["training.batch_size: 32 -> 7"]
    assert config_lib.differences(old, new, ("autoencoder.",)) == []


def test_all_that_decides_the_result_of_a_run_may_not_change():
    flat = config_lib.flatten(tiny.get_config())
    free = {key for key in flat if key.startswith(config_lib.MAY_CHANGE)}
    free_sections = {"mesh", "evaluation", "sampling"}
    assert {key.split(".")[0] for key in free} == free_sections | {
        "data", "autoencoder", "denoiser", "training",
    }  # fmt: skip
    decisive = flat.keys() - free
    assert {"seed", "data.name", "data.image_size", "data.flip", "denoiser.width"} <= decisive
    assert {"autoencoder.num_codes", "text_encoder.width", "training.ema_decay"} <= decisive
    assert {key for key in flat if key.startswith("diffusion.")} <= decisive


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"training": {"momentum": 0.5}}', "unknown config key 'training.momentum'"),
        (b'{"training": {"num_steps": "many"}}', "is not a config that this program wrote"),
        (b'{"training": {"num_steps": 0}}', "training.num_steps=0: must be at least 1"),
        (b'{"seed": 1', "is not a config that this program wrote"),
        (b"[1, 2]", "is not a config that this program wrote"),
        (b"\xff\xfe", "is not a config that this program wrote"),
    ],
)
def test_a_stored_config_that_is_damaged_is_an_error_that_names_the_file(
    tmp_path, content, message
):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        config_lib.load(str(path))
    assert str(path) in str(error.value)
    assert message in str(error.value)
