"""Published layouts of image tokenizers give the published numbers; golden/README.md has their
origin."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqd_jax.errors import UserError
from vqd_jax.interop import tables, taming, tensors, torch_file
from vqd_jax.models import autoencoder, quantizer

sys.path.insert(0, str(Path(__file__).parent))
from torch_writer import tensor, write  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = Path(__file__).parents[1] / "golden"


def nhwc(array):
    return array.transpose(0, 2, 3, 1)


def codec(name):
    return tables.under(torch_file.load(GOLDEN / f"{name}.pth")["model"], "content_codec.")


def check(config, params, numbers, in_range_255=True):
    model = autoencoder.bind(config, params)
    images = nhwc(numbers["image"])
    images = images / 127.5 - 1 if in_range_255 else images
    run = jax.jit(lambda params, x: autoencoder.bind(config, params).encode(x))
    latent = run(params, images)
    np.testing.assert_allclose(latent, nhwc(numbers["enc_latent"]), atol=1e-4)
    full = model.quantize.codes(latent, None).reshape(len(images), -1)
    np.testing.assert_array_equal(full, numbers["enc_codes"])
    if "enc_logits" in numbers:
        logits = model.quantize.proj(latent)
        np.testing.assert_allclose(logits, nhwc(numbers["enc_logits"]), atol=1e-4)
    tokens = full if model.remap is None else model.remap.to_codes(full)
    expected = numbers["enc_tokens"] if "enc_tokens" in numbers else numbers["enc_codes"]
    np.testing.assert_array_equal(tokens, expected)
    decoded = model.decode(jnp.asarray(numbers["decode_ids"]))
    if in_range_255:
        expected = nhwc(numbers["decode_image"])
        np.testing.assert_allclose((decoded + 1) * 127.5, expected, atol=1e-2)
    else:
        expected = nhwc(numbers["decode_image"])
        np.testing.assert_allclose((decoded + 1) / 2, expected, atol=1e-4)


@pytest.mark.parametrize(
    "name", [pytest.param("text_model", marks=pytest.mark.slow), "class_model", "uncond_model"]
)
def test_the_tokenizer_in_a_released_checkpoint(name):
    found, numbers = codec(name), np.load(GOLDEN / f"{name}.npz")
    path = GOLDEN / f"{name}_mapping.pt"
    remap = np.asarray(torch_file.load(path)) if path.exists() else None
    config, params, used = taming.read_released(
        found,
        name,
        image_size=int(numbers["cfg_codec_res"]),
        num_codes=int(numbers["cfg_codec_K"]),
        remap=remap,
    )
    assert used == set(found)
    assert config.quantizer == ("gumbel" if name == "text_model" else "nearest")
    assert config.grid_size == int(numbers["cfg_codec_grid"])
    assert taming.downsampling(tables.under(found, "enc.")) == config.downsampling == 2
    check(config, params, numbers)
    if remap is not None:
        inverse = quantizer.code_to_full(params["remap"]["full_to_code"], config.num_codes)
        np.testing.assert_array_equal(inverse, numbers["quantize_to_full"])
        np.testing.assert_array_equal(params["remap"]["full_to_code"], numbers["full_to_quantize"])


def test_the_tokenizer_with_a_moving_average():
    numbers = np.load(GOLDEN / "patch_vqgan.npz")
    loaded = torch_file.load(GOLDEN / "patch_vqgan.pth")
    assert taming.is_autoencoder(loaded)
    config, params = taming.read(loaded, "patch_vqgan.pth", image_size=16)
    assert config.attention_resolutions == (4,) and config.channel_multipliers == (1, 1, 1)
    check(config, params, numbers)


def test_a_published_step_of_the_moving_average():
    numbers = np.load(GOLDEN / "patch_vqgan.npz")
    names = ("embedding", "cluster_size", "embedding_avg")
    before = quantizer.CodebookState(*(numbers[f"ema_before_{name}"] for name in names))
    z = jnp.asarray(nhwc(numbers["ema_latent"]))
    codes = quantizer.nearest_codes(z, before.codebook)
    np.testing.assert_array_equal(codes, numbers["ema_codes"])
    quantised = quantizer.lookup(codes, before.codebook)
    np.testing.assert_allclose(quantised, nhwc(numbers["ema_quantised"]), atol=1e-6)
    np.testing.assert_allclose(jnp.mean((quantised - z) ** 2), numbers["ema_loss"], rtol=1e-5)
    after = quantizer.update_codebook(before, z, codes, key=jax.random.key(0))
    for name, value in zip(names, dataclasses.astuple(after), strict=True):
        np.testing.assert_allclose(value, numbers[f"ema_after_{name}"], rtol=1e-5, atol=1e-6)


def taming_file(path, names, *, prefix="", extra=None):
    """The tokenizer of the class model under taming's names, as taming saved it."""
    stored = {
        prefix + name: tensor("FloatStorage", np.asarray(array), str(index))
        for index, (name, array) in enumerate(names.items())
    }
    write(path, {"epoch": 3, "state_dict": stored | (extra or {}), "callbacks": {}})
    return torch_file.load(path)


@pytest.fixture(scope="module")
def taming_names():
    found = codec("class_model")
    names = {**tables.under(found, "dec."), **tables.under(found, "enc.")}
    return {name: np.asarray(value) for name, value in names.items()}


def test_tamings_file(tmp_path, taming_names):
    numbers = np.load(GOLDEN / "class_model.npz")
    loss = {"loss.discriminator.main.0.weight": tensor("FloatStorage", np.zeros(3, "f4"), "loss")}
    loaded = taming_file(tmp_path / "vqgan.ckpt", taming_names, extra=loss)
    assert taming.is_autoencoder(loaded)
    config, params = taming.read(loaded, "vqgan.ckpt", image_size=8)
    assert config.num_codes == 37 and config.codebook_size is None
    model = autoencoder.bind(config, params)
    codes = model.codes(nhwc(numbers["image"]) / 127.5 - 1)
    np.testing.assert_array_equal(codes, numbers["enc_codes"])
    remap = numbers["full_to_quantize"]
    check(*taming.read(loaded, "vqgan.ckpt", image_size=8, remap=remap), numbers)


def test_a_tokenizer_inside_a_transformer(tmp_path, taming_names):
    numbers = np.load(GOLDEN / "class_model.npz")
    other = {"transformer.tok_emb.weight": tensor("FloatStorage", np.zeros(3, "f4"), "tok")}
    loaded = taming_file(
        tmp_path / "ffhq.ckpt", taming_names, prefix="first_stage_model.", extra=other
    )
    assert taming.is_autoencoder(loaded)
    remap = numbers["full_to_quantize"]
    check(*taming.read(loaded, "ffhq.ckpt", image_size=8, remap=remap), numbers)


def test_tables_write_what_they_read(taming_names):
    found = codec("text_model")
    config, params, _ = taming.read_released(found, "text_model", image_size=12)
    written = tables.write(taming.released_rows(config), params)
    assert set(written) == {name for name in found if not name.startswith("dec.quantize.")}
    for name, array in written.items():
        np.testing.assert_array_equal(array, np.asarray(found[name]))
    config, params = taming.read(taming_names, "x", image_size=8)
    written = tables.write(taming.rows(config), params)
    assert set(written) == set(taming_names)
    for name, array in written.items():
        np.testing.assert_array_equal(array, taming_names[name])


@pytest.fixture(scope="module")
def diffusers():
    folder = GOLDEN / "diffusers_pipeline" / "vqvae"
    found = tensors.read_safetensors(folder / "diffusion_pytorch_model.safetensors")
    return found, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("old_names", [False, True])
def test_diffusers(diffusers, old_names):
    found, described = diffusers
    if old_names:
        renamed = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
        for new, old in renamed.items():
            found = {name.replace(new, old): value for name, value in found.items()}
    config, params, used = taming.read_diffusers(found, described, "vqvae", grid_size=4)
    assert used == set(found)
    assert (config.norm_groups, config.attention_resolutions) == (8, (4,))
    check(config, params, np.load(GOLDEN / "diffusers_pipeline.npz"), in_range_255=False)
    written = tables.write(taming.diffusers_rows(config, old_names=old_names), params)
    assert set(written) == set(found)
    for name, array in written.items():
        np.testing.assert_array_equal(array, np.asarray(found[name]))
    again = taming.diffusers_config(config)
    assert {name: described[name] for name in again} == again


@pytest.mark.parametrize(
    "change, message",
    [
        ({"act_fn": "relu"}, "act_fn is relu, only silu"),
        ({"block_out_channels": [16, 24]}, "no multiples of the first"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "attends at other levels"),
        ({"latent_channels": None}, "not go together|not that of a VQModel"),
        ({"norm_num_groups": 5}, "channels=16: must be a multiple of norm_groups=5"),
    ],
)
def test_configs_of_diffusers_that_this_network_cannot_have(diffusers, change, message):
    found, described = diffusers
    with pytest.raises(UserError, match=message):
        taming.read_diffusers(found, described | change, "vqvae", grid_size=4)


def test_for_diffusers_the_same_codes_give_the_same_pictures():
    numbers = np.load(GOLDEN / "text_model.npz")
    config, params, _ = taming.read_released(
        codec("text_model"), "x", image_size=12, remap=numbers["full_to_quantize"]
    )
    plain_config, plain = taming.for_diffusers(config, params)
    assert (plain_config.num_codes, plain_config.quantizer) == (29, "nearest")
    assert jax.tree.map(np.shape, plain) == jax.tree.map(
        lambda x: x.shape, autoencoder.abstract_params(plain_config)
    )
    codes = jnp.asarray(numbers["decode_ids"])
    np.testing.assert_array_equal(
        autoencoder.bind(plain_config, plain).decode(codes),
        autoencoder.bind(config, params).decode(codes),
    )
    with pytest.raises(UserError, match="no Gumbel quantizer"):
        taming.diffusers_config(config)
    with pytest.raises(UserError, match="the first multiplier must be 1"):
        taming.diffusers_config(plain_config)


@pytest.mark.parametrize("size, left, used", [(8192, 2887, 2886), (16384, 974, 973)])
def test_published_remaps(size, left, used):
    remap = taming.published_remap(size, left)
    assert remap.shape == (size,) and quantizer.num_remapped(remap) == left
    counts = (remap > 0).astype(int)
    assert counts.sum() == used
    np.testing.assert_array_equal(quantizer.build_remap(counts), remap)
    inverse = np.asarray(quantizer.code_to_full(remap, left))
    np.testing.assert_array_equal(inverse[1:], np.flatnonzero(counts))
    assert inverse[0] == np.flatnonzero(counts == 0)[0]
    assert taming.published_remap(size, left + 1) is None


def test_remaps_that_do_not_fit_are_named(taming_names):
    with pytest.raises(UserError, match="x has 37 codes and the denoiser 21; give the file"):
        taming.read(taming_names, "x", image_size=8, num_codes=21)
    with pytest.raises(UserError, match="remap does not fit x: it is for 5 codes"):
        taming.read(taming_names, "x", image_size=8, remap=np.arange(5))
    with pytest.raises(UserError, match="remap leaves 37 codes, but the denoiser has 21"):
        taming.read(taming_names, "x", image_size=8, num_codes=21, remap=np.arange(37))


def test_other_files_are_refused(taming_names):
    assert not taming.is_autoencoder({"model": {"transformer.blocks.0": np.zeros(3)}})
    assert not taming.is_autoencoder([1, 2])
    with pytest.raises(UserError, match=r"no place for: odd\.key"):
        taming.read(taming_names | {"odd.key": np.zeros(2)}, "x", image_size=8)
    lacking = {n: x for n, x in taming_names.items() if n != "quantize.embedding.weight"}
    with pytest.raises(UserError, match="x is no image tokenizer: it lacks quantize.embed.weight"):
        taming.read(lacking, "x", image_size=8)
    lacking = {n: x for n, x in taming_names.items() if n != "decoder.conv_out.bias"}
    with pytest.raises(UserError, match=r"lacks 1 tensors: decoder\.conv_out\.bias"):
        taming.read(lacking, "x", image_size=8)
    with pytest.raises(UserError, match="image_size=9: must be a multiple of 2"):
        taming.read(taming_names, "x", image_size=9)


def test_the_config_of_a_folder():
    config = autoencoder.AutoencoderConfig(256, 128, (1, 2), 2, (128,), 256, 256, 99)
    described = json.loads(json.dumps(dataclasses.asdict(config)))
    assert taming.config_from_dict(described, "folder") == config
    with pytest.raises(UserError, match="folder/config.json is not that of an autoencoder"):
        taming.config_from_dict({**described, "wings": 2}, "folder")


def test_live_against_diffusers():
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("diffusers.models")
    torch.manual_seed(0)
    config = autoencoder.AutoencoderConfig(16, 16, (1, 2), 2, (8,), 8, 6, 20, norm_groups=4)
    described = taming.diffusers_config(config)
    theirs = models.VQModel.from_config(described).eval()
    found = {name: value.numpy() for name, value in theirs.state_dict().items()}
    read, params, used = taming.read_diffusers(found, described, "vqvae", grid_size=8)
    assert read == config and used == set(found)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        latent = theirs.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latents
        decoded = theirs.decode(latent).sample.numpy()
    model = autoencoder.bind(config, params)
    np.testing.assert_allclose(model.encode(images), nhwc(latent.numpy()), atol=1e-5)
    ours = model.decode(model.codes(images))
    np.testing.assert_allclose(ours, nhwc(decoded).clip(-1, 1), atol=1e-5)
