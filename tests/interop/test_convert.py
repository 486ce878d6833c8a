"""Files in the released layouts, through ``--mode=convert``, to the published numbers."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqd_jax import config as config_lib
from vqd_jax.diffusion import sampler, transition
from vqd_jax.errors import UserError
from vqd_jax.interop import convert, folder, published
from vqd_jax.pipeline import VQDiffusion

jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
OPTIONS = {
    "text_model": {"num_heads": 4, "remap": str(GOLDEN / "text_model_mapping.pt")},
    "class_model": {
        "num_heads": 4, "remap": str(GOLDEN / "class_model_mapping.pt"), "image_size": 8,
    },
    "uncond_model": {"num_heads": 2, "image_size": 8},
    "diffusers_pipeline": {},
}  # fmt: skip
SUFFIX = {"diffusers_pipeline": ""}


def source_of(name):
    return str(GOLDEN / f"{name}{SUFFIX.get(name, '.pth')}")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """{name: model folder} of every golden source."""
    folders = {}
    for name, options in OPTIONS.items():
        folders[name] = str(tmp_path_factory.mktemp("models") / name)
        convert.convert(source_of(name), folders[name], **options)
    return folders


@pytest.fixture(scope="module")
def models(converted):
    return {
        name: VQDiffusion.from_pretrained(path, dtype="float32") for name, path in converted.items()
    }


@pytest.fixture(scope="module")
def golden():
    return {name: dict(np.load(GOLDEN / f"{name}.npz")) for name in OPTIONS}


def class_last(x):
    return np.moveaxis(x, 1, 2)


def log_softmax(logits):
    return np.asarray(jax.nn.log_softmax(jnp.asarray(class_last(logits)), axis=-1))


def test_text_logits(models, golden):
    model, g = models["text_model"], golden["text_model"]
    ours = model.predict_log_x0(g["tokens"], g["clip_features"], g["t"] + 1)
    np.testing.assert_allclose(ours, log_softmax(g["logits"]), atol=1e-4)


def test_class_and_unconditional_logits(models, golden):
    g = golden["class_model"]
    ours = models["class_model"].predict_log_x0(g["tokens"], g["labels"], g["t"] + 1)
    np.testing.assert_allclose(ours, log_softmax(g["logits"]), atol=1e-4)
    g = golden["uncond_model"]
    ours = models["uncond_model"].predict_log_x0(g["tokens"], None, g["t"] + 1)
    np.testing.assert_allclose(ours, log_softmax(g["logits"]), atol=1e-4)


def test_diffusers_texts_and_logits(models, golden):
    model, g = models["diffusers_pipeline"], golden["diffusers_pipeline"]
    prompts = ["the red boat", "a small bird's 12 moons"]
    ids = model.tokenizer.encode_batch(prompts)
    # The last token of the second prompt is "!", which diffusers takes for padding.
    np.testing.assert_array_equal(ids[0], g["text_ids"][0])
    np.testing.assert_array_equal(ids[1][:12], g["text_ids"][2][:12])
    features = model.encode_text(["the red boat"])
    np.testing.assert_allclose(features[0], g["text_embeds"][0], atol=5e-6)
    np.testing.assert_array_equal(model.encode_text([""])[0], g["null_embeds"])
    for timestep, theirs in zip(g["timesteps"], g["transformer_log_p0"], strict=True):
        ours = model.predict_log_x0(g["tokens"], g["text_embeds"], np.full(3, timestep + 1))
        np.testing.assert_allclose(ours, class_last(theirs), atol=1e-4)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_decoded_pictures(models, golden, name):
    g = golden[name]
    scale = 255 if name == "diffusers_pipeline" else 1
    theirs = scale * g["decode_image"].transpose(0, 2, 3, 1)
    # Ours are rounded to whole numbers.
    np.testing.assert_allclose(models[name].decode_codes(g["decode_ids"]), theirs, atol=0.51)


def gumbel_max(log_p, uniform):
    """The draw that the golden chains record: classes second."""
    u = np.moveaxis(uniform, -2, -1).astype(np.float64)
    log_p = np.asarray(log_p, np.float64)
    return np.argmax(log_p - np.log(-np.log(u[..., : log_p.shape[-1]] + 1e-30) + 1e-30), -1)


posteriors = jax.jit(
    jax.vmap(
        jax.vmap(transition.posterior, in_axes=(0, 0, None, None, None)),
        in_axes=(0, 0, None, None, None),
    )
)


def run_chain(model, times, uniforms, condition, null=None, scale=None, rate=None):
    """Tokens after every call [S, B, N]; ``times`` are (time of the network, of the posterior)."""
    batch, num_codes = uniforms.shape[1], model.config.autoencoder.num_codes
    noise_schedule = config_lib.noise_schedule(model.config)
    tokens = np.full((batch, uniforms.shape[-1]), num_codes, np.int32)
    seen = []
    for (time, t), uniform in zip(times, uniforms, strict=True):
        at = np.full(batch, time, np.int32)
        log_x0 = model.predict_log_x0(tokens, condition, at)
        if scale is not None:
            log_x0 = sampler.guide(log_x0, model.predict_log_x0(tokens, null, at), scale)
        if rate is not None:
            log_x0 = sampler.truncate(log_x0, rate)
        log_p = posteriors(log_x0, tokens, t - 1, t, noise_schedule)
        tokens = gumbel_max(log_p, uniform).astype(np.int32)
        seen.append(tokens)
    return np.stack(seen)


def test_a_whole_chain_of_the_class_model(models, golden):
    model, g = models["class_model"], golden["class_model"]
    times = [(t, t) for t in range(len(g["chain_uniform"]), 0, -1)]
    null = np.full_like(g["chain_labels"], published.IMAGENET_NULL)
    tokens = run_chain(
        model, times, g["chain_uniform"], g["chain_labels"], null,
        g["chain_scale"], g["chain_rate"],
    )  # fmt: skip
    np.testing.assert_array_equal(tokens, g["chain_tokens"])
    picture = g["chain_image"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(model.decode_codes(tokens[-1]), picture, atol=0.51)


def test_a_whole_chain_of_the_unconditional_model(models, golden):
    model, g = models["uncond_model"], golden["uncond_model"]
    times = [(t, t) for t in range(len(g["chain_uniform"]), 0, -1)]
    tokens = run_chain(model, times, g["chain_uniform"], None, rate=g["chain_rate"])
    np.testing.assert_array_equal(tokens, g["chain_tokens"])


@pytest.mark.slow
def test_a_fast_chain_of_the_text_model(models, golden):
    model, g = models["text_model"], golden["text_model"]
    settings = sampler.published_fast(int(g["fast_speed"]), config_lib.noise_schedule(model.config))
    times = [(t, int(settings.rule.posterior_time(t))) for t in settings.times[:0:-1]]
    features = model._networks.text_features(g["fast_text_ids"])
    null = g["null_embed"][None]
    tokens = run_chain(model, times, g["fast_uniform"], features, null, 3.0, 0.86)
    np.testing.assert_array_equal(tokens, g["fast_tokens"])
    picture = g["fast_image"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(model.decode_codes(tokens[-1]), picture, atol=0.51)


@pytest.mark.parametrize("run", ["guided", "plain"])
def test_a_whole_chain_of_diffusers(models, golden, run):
    model, g = models["diffusers_pipeline"], golden["diffusers_pipeline"]
    times = [(t, t) for t in range(int(g[f"run_{run}_steps"]), 0, -1)]
    features = g["text_embeds"][np.array([0, 2])]
    scale = float(g[f"run_{run}_scale"])
    rate = float(g[f"run_{run}_rate"])
    tokens = run_chain(
        model, times, g[f"run_{run}_uniform"], features, np.stack([g["null_embeds"]] * 2),
        scale if scale > 1 else None, rate if rate < 1 else None,
    )  # fmt: skip
    np.testing.assert_array_equal(tokens, g[f"run_{run}_tokens"])
    picture = 255 * g[f"run_{run}_image"]
    np.testing.assert_allclose(model.decode_codes(tokens[-1]), picture, atol=0.51)


def test_the_averaged_weights_are_the_default(converted, models, golden, tmp_path):
    g = golden["text_model"]
    convert.convert(
        source_of("text_model"), str(tmp_path / "raw"), weights="raw", **OPTIONS["text_model"]
    )
    raw = VQDiffusion.from_pretrained(str(tmp_path / "raw"), dtype="float32")
    ours = raw.predict_log_x0(g["tokens"], g["clip_features"], g["t"] + 1)
    np.testing.assert_allclose(ours, log_softmax(g["logits_without_ema"]), atol=1e-4)


@pytest.mark.slow
def test_every_kind_of_model_generates(models):
    made = models["class_model"].generate([3, "5", ""], num_images=2, seed=1, num_steps=5)
    assert made.pixels.shape == (3, 2, 8, 8, 3)
    assert len(np.unique(made.codes.reshape(6, -1), axis=0)) == 6
    assert models["uncond_model"].generate(num_images=3, num_steps=5).codes.shape == (1, 3, 16)
    made = models["diffusers_pipeline"].generate(["the red boat"], num_steps=5, guidance_scale=5.0)
    assert made.images[0].size == (8, 8)
    with pytest.raises(UserError, match="class label 1001"):
        models["class_model"].generate([1001])
    with pytest.raises(UserError, match="takes no prompt"):
        models["uncond_model"].generate(["a cat"])
    with pytest.raises(UserError, match="nothing to be guided to"):
        models["uncond_model"].generate(guidance_scale=3.0)
    with pytest.raises(UserError, match="lacks the tokenizer that belongs to it"):
        models["text_model"].generate(["a cat"])


def test_bfloat16_is_stored_in_half_the_bytes(converted, models, tmp_path):
    target = tmp_path / "half"
    convert.convert(source_of("diffusers_pipeline"), str(target), dtype="bfloat16")
    full = pathlib.Path(converted["diffusers_pipeline"]) / "model.safetensors"
    assert (target / "model.safetensors").stat().st_size < 0.55 * full.stat().st_size
    half = VQDiffusion.from_pretrained(str(target))
    codes = np.arange(32).reshape(2, 16) % 19
    whole = models["diffusers_pipeline"].decode_codes(codes).astype(int)
    assert np.abs(half.decode_codes(codes) - whole).max() < 10


def test_how_products_are_computed_is_not_taken_from_a_file(converted):
    path = converted["text_model"]
    assert VQDiffusion.from_pretrained(path).config.denoiser.product_dtype == "auto"
    for dtype, expected in (("float32", "float32"), ("bfloat16", "auto")):
        config = VQDiffusion.from_pretrained(path, dtype=dtype).config
        assert (config.denoiser.dtype, config.denoiser.product_dtype) == (dtype, expected)


def test_saving_and_loading_changes_nothing(converted, tmp_path):
    VQDiffusion.from_pretrained(converted["text_model"]).save_pretrained(str(tmp_path / "again"))
    for name in ("config.json", "model.safetensors", "tokenizer/merges.txt"):
        first = pathlib.Path(converted["text_model"]) / name
        assert (tmp_path / "again" / name).read_bytes() == first.read_bytes(), name


def test_a_download_in_parts_is_joined(converted, tmp_path):
    whole = pathlib.Path(source_of("uncond_model")).read_bytes()
    for suffix, part in (("aa", whole[:1_000_000]), ("ab", whole[1_000_000:])):
        (tmp_path / f"uncond.pth_{suffix}").write_bytes(part)
    target = tmp_path / "model"
    convert.convert(str(tmp_path / "uncond.pth_aa"), str(target), **OPTIONS["uncond_model"])
    first = pathlib.Path(converted["uncond_model"]) / "model.safetensors"
    assert (target / "model.safetensors").read_bytes() == first.read_bytes()


def test_parts_that_do_not_fit_are_named(tmp_path):
    options = OPTIONS["text_model"] | {"remap": None}
    target = tmp_path / "model"
    with pytest.raises(UserError, match="has 48 codes and the denoiser 29; give the file with"):
        convert.convert(source_of("text_model"), str(target), **options)
    with pytest.raises(UserError, match="has 40 codes and the denoiser 19"):
        convert.convert(
            source_of("uncond_model"), str(target), num_heads=4, image_size=16,
            autoencoder=str(GOLDEN / "patch_vqgan.pth"),
        )  # fmt: skip
    with pytest.raises(UserError, match="not divisible by .*--num_heads"):
        convert.convert(source_of("uncond_model"), str(target), num_heads=7, image_size=8)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_no_model_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(UserError, match="other things than a model"):
        convert.convert(source_of("uncond_model"), str(tmp_path), **OPTIONS["uncond_model"])
    assert (tmp_path / "thesis.txt").read_text() == "irreplaceable"


def test_a_source_cut_short_leaves_no_target(tmp_path):
    path = tmp_path / "cut.pth"
    path.write_bytes(pathlib.Path(source_of("text_model")).read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"cut\.pth"):
        convert.convert(str(path), str(tmp_path / "model"))
    with pytest.raises(UserError, match="missing.pth"):
        convert.convert(str(tmp_path / "missing.pth"), str(tmp_path / "model"))
    assert [p.name for p in tmp_path.iterdir()] == ["cut.pth"]


def test_a_diffusers_folder_of_another_kind_is_refused(tmp_path):
    root = tmp_path / "pipeline"
    shutil.copytree(source_of("diffusers_pipeline"), root)
    scheduler = root / "scheduler" / "scheduler_config.json"
    described = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(described | {"gamma_cum_end": 0.9}))
    with pytest.raises(UserError, match=r"gamma_cum_end is 0\.9"):
        convert.convert(str(root), str(tmp_path / "model"))
    (root / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UserError, match="is a StableDiffusionPipeline"):
        convert.convert(str(root), str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def wrapped(loaded, how):
    """The golden checkpoint as other programs save it."""
    model, ema = loaded["model"], loaded["ema"]
    of_all = {f"{how}transformer.{n}": x for n, x in ema.items()}
    prefixed = {name: {how + n: x for n, x in d.items()} for name, d in (("m", model), ("e", ema))}
    return {
        "module.": {"model": prefixed["m"], "ema": prefixed["e"]},
        "_orig_mod.": {"model": prefixed["m"], "model_ema": prefixed["e"]},
        "module._orig_mod.": {"state_dict": prefixed["m"], "ema_state_dict": prefixed["e"]},
        "": {"model_state_dict": model, "ema": {"shadow": ema}},
        "model.": {"state_dict": prefixed["m"], "state_dict_ema": of_all},
    }[how]  # fmt: skip


@pytest.mark.parametrize("how", ["module.", "_orig_mod.", "module._orig_mod.", "", "model."])
def test_wrappers_of_other_programs_are_taken_off(how, converted, tmp_path):
    torch = pytest.importorskip("torch")
    loaded = torch.load(source_of("uncond_model"), map_location="cpu", weights_only=True)
    torch.save(wrapped(loaded, how), tmp_path / "wrapped.pth")
    options = dict(OPTIONS["uncond_model"])
    convert.convert(str(tmp_path / "wrapped.pth"), str(tmp_path / "model"), **options)
    found = folder.read_shards(tmp_path / "model", "model")
    wanted = folder.read_shards(pathlib.Path(converted["uncond_model"]), "model")
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in found)
    if how == "":
        # A flat state dict has no averaged weights, and says so.
        torch.save(loaded["model"], tmp_path / "flat.pth")
        with pytest.raises(UserError, match="no averaged weights; use --weights=raw"):
            convert.convert(str(tmp_path / "flat.pth"), str(tmp_path / "flat"), **options)
        convert.convert(
            str(tmp_path / "flat.pth"), str(tmp_path / "flat"), weights="raw", **options
        )
        torch.save([1, 2], tmp_path / "list.pth")
        with pytest.raises(UserError, match="holds no weights with names: it is list"):
            convert.convert(str(tmp_path / "list.pth"), str(tmp_path / "list"))
