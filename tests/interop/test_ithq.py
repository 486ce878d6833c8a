"""A released checkpoint of ITHQ's kind: a codebook that is a moving average, inside a text model.

The image tokenizer has published numbers; the denoiser and CLIP are random.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from vqd_jax import config as config_lib
from vqd_jax.errors import UserError
from vqd_jax.interop import convert, torch_file
from vqd_jax.models import autoencoder, conditioned
from vqd_jax.models.denoiser import DenoiserConfig
from vqd_jax.models.text_encoder import TextEncoderConfig
from vqd_jax.pipeline import VQDiffusion

sys.path.insert(0, str(Path(__file__).parent))
import released  # noqa: E402
from torch_writer import write  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG = conditioned.ConditionedDenoiserConfig(
    TextEncoderConfig(
        vocab_size=49408, context_length=77, width=64, num_layers=1, num_heads=1, normalize=True
    ),
    DenoiserConfig(
        num_codes=40, grid=(4, 4), num_steps=100, width=32, num_layers=2, num_heads=4,
        text_width=64, learned_null=True,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def numbers():
    return np.load(GOLDEN / "patch_vqgan.npz")


@pytest.fixture(scope="module")
def codec():
    """The published tokenizer with a moving average, sums of the average included."""
    loaded = torch_file.load(GOLDEN / "patch_vqgan.pth")["model"]
    return released.codec_names({name: np.asarray(array) for name, array in loaded.items()})


@pytest.fixture(scope="module")
def params():
    """Random parameters of the denoiser ("raw" are those before averaging), CLIP and the null."""
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(lambda: conditioned.init_params(CONFIG, jax.random.key(0)))
    abstract["raw"] = abstract["denoiser"]
    params = released.fill(abstract, lambda shape: rng.normal(scale=0.1, size=shape))
    # CLIP is released in half precision.
    params["text_encoder"] = jax.tree.map(
        lambda x: x.astype(np.float16).astype(np.float32), params["text_encoder"]
    )
    return params


@pytest.fixture(scope="module")
def source(codec, params, tmp_path_factory):
    text = {f"condition_emb.{n}": x for n, x in released.text_names(params["text_encoder"]).items()}
    denoisers = [
        {f"transformer.{n}": x for n, x in released.denoiser_names(CONFIG.denoiser, p).items()}
        for p in (params["raw"], params["denoiser"])
    ]
    null = {"empty_text_embed": params["null_text"].astype(np.float64)}
    diffusion = released.schedule_names(100) | text | denoisers[0] | null
    path = tmp_path_factory.mktemp("released") / "ithq.pth"
    write(path, released.checkpoint(codec, diffusion, denoisers[1], moments=True))
    return path


@pytest.fixture(scope="module")
def model(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("models") / "ithq"
    convert.convert(str(source), str(target), num_heads=4)
    return VQDiffusion.from_pretrained(str(target), dtype="float32")


def test_what_was_found(model):
    codec = model.config.autoencoder
    assert (codec.num_codes, codec.quantizer, codec.codebook_size) == (40, "nearest", 0)
    assert (model.config.data.image_size, codec.codebook_dim) == (16, 12)
    assert tuple(codec.attention_resolutions) == (4,)
    assert model._networks.sizes.denoiser == dataclasses.replace(CONFIG.denoiser, learned_null=True)
    assert model._networks.sizes.text_encoder == CONFIG.text_encoder


def test_the_tokenizer_gives_the_published_numbers(model, numbers):
    codec = autoencoder.bind(
        config_lib.autoencoder_config(model.config), model._networks.autoencoder_params
    )
    codes = codec.codes(numbers["image"].transpose(0, 2, 3, 1) / 127.5 - 1)
    np.testing.assert_array_equal(codes, numbers["enc_codes"])
    theirs = numbers["decode_image"].transpose(0, 2, 3, 1)
    # Ours are rounded to whole numbers.
    np.testing.assert_allclose(model.decode_codes(numbers["decode_ids"]), theirs, atol=0.51)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_the_networks_are_the_given_ones(model, source, params, weights, tmp_path):
    if weights == "raw":
        convert.convert(str(source), str(tmp_path / "raw"), num_heads=4, weights="raw")
        model = VQDiffusion.from_pretrained(str(tmp_path / "raw"), dtype="float32")
    given = {name: params[name] for name in ("text_encoder", "null_text")}
    given["denoiser"] = params["denoiser" if weights == "ema" else "raw"]
    exact = conditioned.bind(CONFIG, given)
    prompts = ["teddy bear playing in the pool", ""]
    ids = model.tokenizer.encode_batch(prompts)
    features = model.encode_text(prompts)
    np.testing.assert_allclose(features, exact.text_features(ids), atol=1e-6)
    np.testing.assert_array_equal(features[1], params["null_text"])
    tokens = np.random.default_rng(1).integers(0, 41, (2, 16))
    ours = model.predict_log_x0(tokens, features, np.array([1, 100]))
    np.testing.assert_allclose(ours, exact.log_x0(tokens, np.array([1, 100]), ids), atol=1e-5)


@pytest.mark.slow
def test_it_generates(model):
    made = model.generate(["teddy bear", ""], num_images=2, num_steps=3, guidance_scale=5.0)
    assert made.pixels.shape == (2, 2, 16, 16, 3)
    assert 0 <= made.codes.min() and made.codes.max() < 40


def test_a_stored_average_without_its_codebook_is_named(codec, source, tmp_path):
    content = torch_file.load(source)
    arrays = {name: np.asarray(x) for name, x in content["model"].items()}
    diffusion = {
        n.removeprefix("transformer."): x for n, x in arrays.items() if n.startswith("transformer.")
    }
    less = {name: x for name, x in codec.items() if not name.endswith("quantize.embedding")}
    write(tmp_path / "cut.pth", released.checkpoint(less, diffusion, {}))
    with pytest.raises(UserError, match=r"lacks quantize\.embed"):
        convert.convert(str(tmp_path / "cut.pth"), str(tmp_path / "model"), num_heads=4)
    assert [path.name for path in tmp_path.iterdir()] == ["cut.pth"]
