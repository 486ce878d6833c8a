import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vqd_jax.diffusion import rules, sampler, schedule
from vqd_jax.errors import UserError
from vqd_jax.generation import draw
from vqd_jax.interop import pretrained
from vqd_jax.models import conditioned, linear
from vqd_jax.models.denoiser import DenoiserConfig
from vqd_jax.models.text_encoder import TextEncoderConfig
from vqd_jax.pipeline import RULES, VQDiffusion

jax.config.update("jax_numpy_rank_promotion", "raise")

PROMPTS = ["red heart", "", "a black cat"]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model


@pytest.fixture(scope="module")
def made(model):
    return model.generate(PROMPTS, num_images=2, seed=3, trajectory=True)


def test_shapes_and_ranges(made):
    assert made.pixels.shape == (3, 2, 16, 16, 3)
    assert made.pixels.dtype == np.uint8
    assert len(made.images) == 6
    np.testing.assert_array_equal(np.asarray(made.images[3]), made.pixels[1, 1])
    assert made.codes.shape == (3, 2, 16)
    assert made.codes.min() >= 0
    assert made.codes.max() < 32
    assert made.trajectory.shape == (10, 3, 2, 16)
    np.testing.assert_array_equal(made.trajectory[-1], made.codes)


def test_every_step_unmasks_on_average_a_tenth(made):
    masked = (made.trajectory == 32).mean(axis=(1, 2, 3))
    assert np.all(np.diff(masked) <= 0)
    # Three standard deviations of the share among 96 tokens.
    np.testing.assert_allclose(masked, np.linspace(0.9, 0, 10), atol=0.15)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_image_does_not_depend_on_the_batch_size(model, made, batch_size):
    again = model.generate(PROMPTS, num_images=2, seed=3, batch_size=batch_size)
    np.testing.assert_array_equal(again.codes, made.codes)


def test_an_image_depends_on_its_seed_prompt_and_numbers_only(model, made):
    fewer = model.generate(PROMPTS[:1], num_images=1, seed=3)
    np.testing.assert_array_equal(fewer.codes[0, 0], made.codes[0, 0])
    other_seed = model.generate(PROMPTS, num_images=2, seed=4)
    assert (other_seed.codes != made.codes).any(axis=-1).all()
    other_prompt = model.generate(["blue heart"], num_images=1, seed=3)
    assert (other_prompt.codes[0, 0] != made.codes[0, 0]).any()
    flat = made.codes.reshape(6, 16)
    assert len(np.unique(flat, axis=0)) == 6


def test_every_seed_of_32_bits_will_do(model):
    largest, next_to_it = (
        model.generate(["a cat"], num_steps=3, seed=seed).codes for seed in (2**32 - 1, 2**31)
    )
    assert (largest != next_to_it).any()


@pytest.mark.parametrize("half", ["\ud83d", "\udce9"])
def test_half_a_character_in_a_prompt_is_none(model, half):
    # A text that was cut within an emoji, and a byte of a command line that is no UTF-8.
    options = {"num_steps": 2, "guidance_scale": 2.0}
    cut = model.generate([f"a cat {half}"], negative_prompt=f"a dog {half}", **options)
    whole = model.generate(["a cat \ufffd"], negative_prompt="a dog \ufffd", **options)
    np.testing.assert_array_equal(cut.codes, whole.codes)


def test_scale_seed_and_prompt_do_not_recompile(model):
    model.generate(["a"], num_images=1, guidance_scale=2.0, truncation=0.9)
    compiled = model._networks.sample._cache_size()
    model.generate(["b"], num_images=1, guidance_scale=4.0, truncation=0.5, seed=9)
    assert model._networks.sample._cache_size() == compiled


@pytest.mark.slow
def test_fewer_steps(model):
    made = model.generate(["red heart"], num_steps=3, trajectory=True)
    assert made.trajectory.shape == (3, 1, 1, 16)
    # The likeliest codes of the last step are where the last tokens come from.
    assert made.predictions.shape == (3, 1, 1, 16)
    assert made.predictions.max() < 32
    listed = model.generate(["red heart"], times=[0, 4, 7, 10], trajectory=True)
    np.testing.assert_array_equal(listed.trajectory, made.trajectory)


@pytest.mark.slow
def test_the_likeliest_code_alone_is_what_the_predictions_say(model):
    options = {"guidance_scale": 1, "truncation": 1, "trajectory": True}
    made = model.generate(["a cat"], num_steps=1, top_k=1, **options)
    np.testing.assert_array_equal(made.codes, made.predictions[0])
    cold = model.generate(["a cat"], num_steps=1, temperature=1e-3, **options)
    np.testing.assert_array_equal(cold.codes, made.codes)


def test_guidance_leads_away_from_a_negative_prompt(model):
    def draw(prompt, **options):
        options = {"seed": 3, "truncation": 1.0, "num_images": 4, "trajectory": True} | options
        return model.generate([prompt], **options).codes

    # At scale 0 only what guidance leads away from counts; at 1 it does not.
    away = draw("red heart", guidance_scale=0.0, negative_prompt="a black cat")
    np.testing.assert_array_equal(away, draw("a black cat", guidance_scale=1.0))
    plain = draw("red heart", guidance_scale=2.0)
    assert (draw("red heart", guidance_scale=2.0, negative_prompt="a black cat") != plain).any()
    empty = draw("red heart", guidance_scale=2.0, negative_prompt="")
    np.testing.assert_array_equal(empty, plain)
    with pytest.raises(UserError, match="negative_prompt: needs a guidance_scale"):
        draw("red heart", guidance_scale=1.0, negative_prompt="a black cat")


def test_guidance_by_step(model):
    options = {"num_steps": 4, "seed": 3, "num_images": 2}
    ramp = model.generate(["a cat"], guidance_scale=4.0, guidance_ramp=True, **options)
    listed = model.generate(["a cat"], guidance_scale=[1, 2, 3, 4], **options)
    np.testing.assert_array_equal(ramp.codes, listed.codes)


def test_reconstruction_goes_through_the_codes(model):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3)).astype(np.uint8)
    whole = model.reconstruct(images)
    assert whole.shape == images.shape
    np.testing.assert_array_equal(model.reconstruct(images, batch_size=2), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "num_images=0"),
        ({"num_steps": 11}, "num_steps=11"),
        ({"seed": -1}, "seed=-1"),
        ({"guidance_scale": -2.0}, r"guidance_scale=-2\.0"),
        ({"truncation": 0.0}, r"truncation=0\.0"),
    ],
)
def test_impossible_requests_are_named(model, options, message):
    with pytest.raises(UserError, match=message):
        model.generate(["x"], **options)


def test_no_prompt_is_an_error(model):
    with pytest.raises(UserError, match="at least one prompt"):
        model.generate([])


def test_only_the_masked_part_is_painted(model):
    image = np.random.default_rng(1).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    known = model.encode_images(image[None])[0].reshape(4, 4)
    mask = np.zeros((16, 16), bool)
    # Three pixels, which lie in two of the 4x4 cells.
    mask[5, 6:9] = True
    made = model.inpaint(image, mask, "a cat", num_images=3, seed=2, trajectory=True)
    painted = np.zeros((4, 4), bool)
    painted[1, 1:3] = True
    for step in made.trajectory[:, 0]:
        for tokens in step:
            np.testing.assert_array_equal(tokens.reshape(4, 4)[~painted], known[~painted])
    np.testing.assert_array_equal(made.codes[0], made.trajectory[-1, 0])
    assert len(np.unique(made.codes[0], axis=0)) > 1
    as_pictures = model.inpaint(
        Image.fromarray(image), Image.fromarray(mask.astype(np.uint8) * 255), "a cat",
        num_images=3, seed=2,
    )  # fmt: skip
    np.testing.assert_array_equal(as_pictures.codes, made.codes)
    as_floats = model.inpaint(image, mask.astype(np.float32), "a cat", num_images=3, seed=2)
    np.testing.assert_array_equal(as_floats.codes, made.codes)


def test_what_is_painted_may_begin_from_the_picture(model):
    image = np.random.default_rng(1).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    codes = model.encode_images(image[None])[0]
    mask = np.zeros((16, 16), bool)
    mask[:8] = True
    options = {"num_images": 8, "seed": 2, "trajectory": True}
    kept = []
    for strength in (0.3, 1.0):
        made = model.inpaint(image, mask, "a cat", strength=strength, **options)
        assert (made.trajectory[..., 8:] == codes[8:]).all()
        kept.append((made.trajectory[0, ..., :8] == codes[:8]).mean())
    assert kept[0] > 0.5
    assert kept[1] < 0.2


def test_what_is_no_picture_is_named(model):
    image = np.zeros((16, 16, 3), np.uint8)
    for call in (
        lambda: model.inpaint("cat.png", image, "a cat"),
        lambda: model.inpaint(image, "cat.png", "a cat"),
        lambda: model.edit("cat.png", "a cat"),
        lambda: model.encode_images(["cat.png"]),
    ):
        with pytest.raises(UserError, match="cat.png is a path: open the picture first"):
            call()
    with pytest.raises(UserError, match="no picture is given"):
        model.encode_images([])


def test_a_mask_of_a_picture_that_is_cut_is_cut_alike(model):
    image = np.zeros((20, 40, 3), np.uint8)
    mask = np.zeros((20, 40), bool)
    mask[:, :10] = True
    # The crop keeps the middle twenty columns, which the mask leaves out.
    with pytest.raises(UserError, match="the mask is empty"):
        model.inpaint(image, mask, "a cat")
    mask[0, 10] = True
    made = model.inpaint(image, mask, "a cat")
    changed = made.codes[0, 0] != model.encode_images(image[None])[0]
    assert not changed[1:].any()


@pytest.mark.slow
def test_editing_keeps_more_of_the_picture_at_low_strength(model):
    image = np.random.default_rng(1).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    codes = model.encode_images(image[None])[0]
    kept = []
    for strength in (0.3, 0.6, 1.0):
        made = model.edit(image, "a cat", strength=strength, num_images=8, trajectory=True)
        # After the first step; the last one draws all codes from what the network says.
        kept.append((made.trajectory[0] == codes).mean())
    # About 1 - strength of the codes are not masked, and most of those stay.
    assert kept[0] > 0.5
    assert kept[0] > kept[1] + 0.1 > kept[2] + 0.2
    assert kept[2] < 0.1


def test_the_parts_are_the_whole(model):
    features = model.encode_text(["red heart", ""])
    assert features.shape == (2, 16, 16)
    codes = np.full((2, 16), 32)
    log_x0 = model.predict_log_x0(codes, features, np.array([10, 1]))
    assert log_x0.shape == (2, 16, 32)
    np.testing.assert_allclose(np.exp(log_x0).sum(-1), 1, rtol=1e-5)
    with pytest.raises(UserError, match=r"codes lie in 0\.\.32; the model knows 0\.\.31"):
        model.decode_codes(np.array([[0] * 15 + [32]]))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_ends_without_masks(model, rule):
    made = model.generate(["red heart"], num_images=2, num_steps=4, rule=rule)
    assert made.codes.max() < 32


def test_a_rule_may_be_given_with_its_numbers(model):
    plain = model.generate(["red heart"], num_steps=4, rule="purity")
    given = model.generate(["red heart"], num_steps=4, rule=rules.Purity(1.0))
    np.testing.assert_array_equal(plain.codes, given.codes)
    with pytest.raises(UserError, match="rule='best': must be one of ordinary"):
        model.generate(["x"], rule="best")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.edit(np.zeros((16, 16, 3)), "x"), "must be uint8"),
        (lambda m: m.edit(np.zeros((16, 16, 3), np.uint8), "x", strength=0), "strength=0"),
        (
            lambda m: m.inpaint(np.zeros((16, 16, 3), np.uint8), np.ones((8, 16)), "x"),
            r"the mask is \[8, 16\], the picture \[16, 16\]",
        ),
        (lambda m: m.generate([3]), "prompt 3: must be a text"),
    ],
)
def test_impossible_pictures_are_named(model, call, message):
    with pytest.raises(UserError, match=message):
        call(model)


def test_a_model_comes_back_from_its_folder(model, made, tmp_path):
    model.save_pretrained(str(tmp_path / "model"))
    again = VQDiffusion.from_pretrained(str(tmp_path / "model"))
    same = again.generate(PROMPTS, num_images=2, seed=3)
    np.testing.assert_array_equal(same.codes, made.codes)
    np.testing.assert_array_equal(same.pixels, made.pixels)


def test_a_folder_in_the_home_directory_is_found(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("~/model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert VQDiffusion.from_pretrained("~/model").fingerprint() == model.fingerprint()
    # What it makes goes beside it, and not into the working directory.
    assert pretrained.beside("~/model") == tmp_path / "model"


def test_fingerprint_says_whether_products_are_rounded(tiny_run, monkeypatch):
    def fingerprint(product_dtype, has_bfloat16):
        monkeypatch.setattr(linear, "cpu_has_bfloat16", lambda: has_bfloat16)
        found = pretrained.load_run(str(tiny_run))
        found.config.denoiser.product_dtype = product_dtype
        return VQDiffusion(*found).fingerprint()

    exact, rounded = fingerprint("float32", True), fingerprint("bfloat16", False)
    assert exact != rounded
    assert fingerprint("auto", False) == exact
    assert fingerprint("auto", True) == rounded


def test_folders_of_other_things_are_named(model, tmp_path):
    with pytest.raises(UserError, match="is no model folder and no workdir"):
        VQDiffusion.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text('{"kind": "clip"}')
    with pytest.raises(UserError, match="holds a model of kind 'clip'"):
        VQDiffusion.from_pretrained(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="convert it first"):
        VQDiffusion.from_pretrained(str(tmp_path))


@pytest.mark.slow
def test_guidance_of_zero_is_the_model_without_its_text(model):
    def draw(prompt, scale):
        options = dict(num_images=4, seed=3, guidance_scale=scale, truncation=1.0)
        return model.generate([prompt], **options).codes

    without = draw("", 1.0)
    np.testing.assert_array_equal(draw("red heart", 0.0), without)
    assert (draw("red heart", 1.0) != without).any()


SMALL = conditioned.ConditionedDenoiserConfig(
    TextEncoderConfig(vocab_size=20, context_length=6, width=14, num_layers=2, num_heads=2),
    DenoiserConfig(
        num_codes=11, grid=(2, 3), num_steps=9, width=12, num_layers=3, num_heads=2, text_width=14
    ),
)


@pytest.mark.slow
def test_texts_and_times_are_worked_out_once_a_generation():
    params = jax.jit(lambda: conditioned.init_params(SMALL, jax.random.key(0)))()
    settings = sampler.Settings(num_steps=4, guidance=jnp.float32(5.0))
    keys, ids = jax.random.split(jax.random.key(1), 2), jnp.ones((2, 6), jnp.int32)
    program = jax.jit(
        lambda *args: draw(
            *args, model_config=SMALL, schedule=schedule.released(9, 11)
        )
    )  # fmt: skip
    compiled = program.lower(params, keys, ids, ids[:1], settings).compile().as_text()
    # What a loop reads is in the tuple that it carries.
    loops = [line for line in compiled.splitlines() if re.search(r" while\(", line)]
    block = params["denoiser"]["blocks"]

    def read_in_a_loop(kernel):
        shape = ",".join(map(str, kernel.shape))
        assert f"f32[{shape}]" in compiled
        return any(f"f32[{shape}]" in line for line in loops)

    assert read_in_a_loop(block["mlp_in"]["kernel"])
    assert not read_in_a_loop(block["cross_attention"]["key"]["kernel"])
    assert not read_in_a_loop(block["norm_self"]["linear"]["kernel"])
