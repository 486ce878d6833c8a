"""Models in the layouts of other programs, and what those programs make of them."""

import pathlib

import jax
import numpy as np
import pytest

from configs import tiny
from vqd_jax import config as config_lib
from vqd_jax.errors import UserError
from vqd_jax.interop import convert, torch_file
from vqd_jax.models import autoencoder, conditioned
from vqd_jax.pipeline import VQDiffusion

jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TEXT = {"num_heads": 4, "remap": str(GOLDEN / "text_model_mapping.pt")}


def load(tmp_path_factory, source, **options):
    target = tmp_path_factory.mktemp("models") / "model"
    convert.convert(str(GOLDEN / source), str(target), **options)
    return VQDiffusion.from_pretrained(str(target), dtype="float32")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return load(tmp_path_factory, "text_model.pth", **TEXT)


@pytest.fixture(scope="module")
def pipeline_model(tmp_path_factory):
    return load(tmp_path_factory, "diffusers_pipeline")


@pytest.fixture(scope="module")
def exported(pipeline_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "pipeline"
    pipeline_model.save_pretrained(str(folder), format="diffusers")
    return folder


def open_pipeline(folder):
    """diffusers' pipeline of a folder."""
    diffusers = pytest.importorskip("diffusers", reason="comes with the extra 'convert'")
    pipelines = "diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion"
    module = pytest.importorskip(pipelines)
    # The index of a pipeline can name only what the library's front page has.
    name = "LearnedClassifierFreeSamplingEmbeddings"
    setattr(diffusers, name, getattr(module, name))
    return diffusers.VQDiffusionPipeline.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def theirs(exported):
    return open_pipeline(exported)


def random_params(config):
    """Parameters of the denoiser with its text encoder, and of the autoencoder."""
    sizes, codec = config_lib.model_config(config), config_lib.autoencoder_config(config)
    key = jax.random.key(0)
    return jax.jit(
        lambda: (conditioned.init_params(sizes, key), autoencoder.init_params(codec, key))
    )()


def leaves(params):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(params)}


def assert_same(ours, back):
    for name in ("params", "autoencoder_params"):
        first, second = leaves(getattr(ours._networks, name)), leaves(getattr(back._networks, name))
        assert first.keys() == second.keys()
        for path in first:
            np.testing.assert_array_equal(first[path], second[path], err_msg=path)


def test_diffusers_layout_comes_back(pipeline_model, exported, tmp_path):
    convert.convert(str(exported), str(tmp_path / "back"))
    assert_same(
        pipeline_model, VQDiffusion.from_pretrained(str(tmp_path / "back"), dtype="float32")
    )


def test_diffusers_gives_the_same_logits(pipeline_model, theirs):
    import torch

    rng = np.random.default_rng(0)
    tokens, features = rng.integers(0, 20, (3, 16)), rng.normal(size=(3, 77, 32))
    features = features.astype(np.float32)
    for timestep in (0, 4, 9):
        with torch.no_grad():
            log_x0 = theirs.transformer(
                torch.from_numpy(tokens),
                encoder_hidden_states=torch.from_numpy(features),
                timestep=torch.tensor(timestep),
            ).sample
        ours = pipeline_model.predict_log_x0(tokens, features, np.full(3, timestep + 1))
        np.testing.assert_allclose(ours, log_x0.numpy().transpose(0, 2, 1), rtol=1e-3, atol=1e-5)


def test_diffusers_gives_the_same_texts_and_pictures(pipeline_model, theirs):
    import torch

    prompts = ["the red boat", "a small bird"]
    with torch.no_grad():
        features = theirs._encode_prompt(prompts, 1, do_classifier_free_guidance=False)
    np.testing.assert_allclose(pipeline_model.encode_text(prompts), features.numpy(), atol=1e-5)
    codes = np.random.default_rng(0).integers(0, 19, (4, 16))
    with torch.no_grad():
        embedded = theirs.vqvae.quantize.get_codebook_entry(
            torch.from_numpy(codes), shape=(4, 4, 4, 12)
        )
        decoded = theirs.vqvae.decode(embedded, force_not_quantize=True).sample
    pixels = 255 * (decoded / 2 + 0.5).clamp(0, 1).numpy().transpose(0, 2, 3, 1)
    # Rounding to whole numbers alone.
    np.testing.assert_allclose(pipeline_model.decode_codes(codes), pixels, atol=0.51)


def test_diffusers_generates_from_our_folder(theirs):
    import torch

    made = theirs(
        "the red boat", num_inference_steps=3, generator=torch.Generator().manual_seed(0),
        output_type="np",
    )  # fmt: skip
    assert made.images.shape == (1, 8, 8, 3)


@pytest.mark.slow
def test_a_codec_that_diffusers_cannot_have_is_refused(text_model, tmp_path):
    with pytest.raises(UserError, match="the first multiplier must be 1"):
        text_model.save_pretrained(str(tmp_path / "pipeline"), format="diffusers")
    assert list(tmp_path.iterdir()) == []


def test_published_layout_comes_back(text_model, tmp_path):
    torch = pytest.importorskip("torch", reason="comes with the extra 'convert'")
    text_model.save_pretrained(str(tmp_path / "model.pth"), format="published")
    written = torch.load(tmp_path / "model.pth", weights_only=True)
    original = torch_file.load(GOLDEN / "text_model.pth")
    # Names and shapes are those of the released layout, schedule and unused buffers included.
    clip_projection = {"transformer.condition_emb.text_projection"}
    assert set(written["model"]) == set(original["model"]) - clip_projection
    for name, tensor in written["model"].items():
        assert tuple(tensor.shape) == tuple(original["model"][name].shape), name
    for name, tensor in written["ema"].items():
        if name.startswith("log_"):
            stored = np.asarray(original["ema"][name])
            finite = np.isfinite(stored)
            # The published code takes differences of nearly equal numbers in float32.
            np.testing.assert_allclose(tensor.numpy()[finite], stored[finite], rtol=2e-6)
    options = TEXT | {"remap": str(tmp_path / "model_mapping.pt")}
    convert.convert(str(tmp_path / "model.pth"), str(tmp_path / "back"), **options)
    assert_same(text_model, VQDiffusion.from_pretrained(str(tmp_path / "back"), dtype="float32"))


def test_what_a_layout_cannot_hold_is_an_error(tmp_path_factory, tmp_path):
    model = load(tmp_path_factory, "uncond_model.pth", num_heads=2, image_size=8)
    with pytest.raises(UserError, match="diffusers has no denoiser with condition 'none'"):
        model.save_pretrained(str(tmp_path / "x"), format="diffusers")
    with pytest.raises(UserError, match="format='onnx'"):
        model.save_pretrained(str(tmp_path / "x"), format="onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["diffusers", "published"])
def test_features_that_others_would_scale_are_refused(tmp_path, layout):
    config = tiny.get_config()
    model = VQDiffusion(config, *random_params(config))
    with pytest.raises(UserError, match="text_encoder.normalize=False"):
        model.save_pretrained(str(tmp_path / "x"), format=layout)
    assert list(tmp_path.iterdir()) == []


def test_diffusers_draws_with_the_context_length_of_the_model(tmp_path):
    """The tokenizer pads to what the text encoder takes: 16 tokens of configs/tiny.py, not 77."""
    config = tiny.get_config()
    config.text_encoder.normalize = True
    model = VQDiffusion(config, *random_params(config))
    model.save_pretrained(str(tmp_path / "pipeline"), format="diffusers")
    made = open_pipeline(tmp_path / "pipeline")(
        "the red boat", num_inference_steps=2, output_type="np"
    )
    assert made.images.shape == (1, 16, 16, 3)
