"""Generation in segments, from codes, with seeds of its own for each picture, in few shapes."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from vqd_jax.errors import UserError
from vqd_jax.generation import Cancelled
from vqd_jax.parallel import sharding

jax.config.update("jax_numpy_rank_promotion", "raise")

PROMPTS = ["red heart", "", "a black cat"]


@pytest.fixture(scope="module")
def model(tiny_model):
    # Programs of its own, so that they can be counted.
    return type(tiny_model)(
        tiny_model.config, tiny_model._networks.params, tiny_model._networks.autoencoder_params
    )


def codes(count, seed=0):
    return np.random.default_rng(seed).integers(0, 32, (count, 16)).astype(np.int32)


def half_known():
    known = codes(3)
    known[0, :8], known[1, 2:], known[2, ::2] = 32, 32, 32
    return known


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"rule": "purity", "num_steps": 5}, marks=pytest.mark.slow),
        pytest.param({"rule": "remask", "guidance_scale": 1.0}, marks=pytest.mark.slow),
        pytest.param(
            {"rule": "halton", "guidance_scale": 3.0, "guidance_interval": (0.2, 0.7)},
            marks=pytest.mark.slow,
        ),
        pytest.param({"known": half_known()}, marks=pytest.mark.slow),
        {"initial": codes(3), "strength": 0.35, "top_k": 4},
        pytest.param({"times": (0, 1, 5, 10)}, marks=pytest.mark.slow),
    ],
)
def test_segments_make_the_pictures_of_a_whole_call(model, options):
    options = {"seed": 3, "trajectory": True} | options
    whole = model.generate(PROMPTS, **options)
    parts = model.generate(PROMPTS, callback=lambda preview: None, callback_steps=3, **options)
    np.testing.assert_array_equal(parts.codes, whole.codes)
    np.testing.assert_array_equal(parts.pixels, whole.pixels)
    np.testing.assert_array_equal(parts.trajectory, whole.trajectory)
    np.testing.assert_array_equal(parts.predictions, whole.predictions)


def test_previews_show_what_is_decided_and_what_may_come(model):
    seen = []
    options = {"seed": 3, "rule": "confidence", "num_images": 2, "batch_size": 4}
    made = model.generate(PROMPTS, callback=seen.append, callback_steps=4, **options)
    whole = model.generate(PROMPTS, trajectory=True, **options)
    # Two batches: four pictures, and two in batches of one.
    assert [p.pictures for p in seen] == [range(4)] * 3 + [range(4, 5)] * 3 + [range(5, 6)] * 3
    assert [p.step for p in seen] == [4, 8, 10] * 3
    assert {p.num_steps for p in seen} == {10}
    np.testing.assert_allclose(
        [p.progress for p in seen],
        [0.4 / 1.5, 0.8 / 1.5, 1 / 1.5, *(4.4, 4.8, 5), *(5.4, 5.8, 6)]
        / np.array([1] * 3 + [6] * 6),
    )
    tokens = whole.trajectory.reshape(10, 6, 16)
    for p in seen:
        np.testing.assert_array_equal(p.tokens, tokens[p.step - 1, p.pictures])
        np.testing.assert_array_equal(p.decided, p.tokens < 32)
        assert (p.codes == np.where(p.decided, p.tokens, p.candidates[..., 0])).all()
        assert p.candidates.shape == p.probabilities.shape == (len(p.pictures), 16, 5)
        assert (np.diff(p.probabilities) <= 0).all()
        assert (p.probabilities.sum(-1) <= 1 + 1e-5).all()
        there = p.candidates == p.codes[..., None]
        known = there.any(-1)
        np.testing.assert_allclose(
            p.confidence[known], p.probabilities[there], rtol=1e-6, atol=1e-12
        )
        assert p.pixels.shape == (len(p.pictures), 16, 16, 3)
    predictions = whole.predictions.reshape(10, 6, 16)
    np.testing.assert_array_equal(seen[0].candidates[..., 0], predictions[3, :4])
    np.testing.assert_array_equal(seen[2].pixels, made.pixels.reshape(6, 16, 16, 3)[:4])


def test_one_program_serves_all_segments_of_all_numbers_of_steps(model):
    def watched(**options):
        model.generate(["a cat"], callback=lambda _: None, callback_steps=3, **options)

    watched(num_steps=10)
    compiled = model._networks.advance._cache_size()
    watched(num_steps=7, seed=5)
    watched(times=(0, 2, 10), temperature=0.5, guidance_scale=7.0)
    assert model._networks.advance._cache_size() == compiled


@pytest.mark.slow
def test_a_callback_may_cancel(model):
    seen = []

    def stop(preview):
        seen.append(preview.step)
        return len(seen) < 2

    with pytest.raises(Cancelled, match="after step 4 of 10"):
        model.generate(["a cat"], callback=stop, callback_steps=2)
    assert seen == [2, 4]

    def fail(preview):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model.generate(["a cat"], callback=fail)
    with pytest.raises(UserError, match="callback_steps=0"):
        model.generate(["a cat"], callback=fail, callback_steps=0)


def test_a_picture_with_its_own_seed_is_the_same_alone_and_in_a_batch(model):
    seeds = [7, 2**32 - 1, 7]
    negatives = ["a cat", "", "a dog"]
    together = model.generate(PROMPTS, seed=seeds, num_images=2, negative_prompt=negatives)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, seeds, strict=True)):
        alone = model.generate(prompt, seed=seed, num_images=2, negative_prompt=negatives[i])
        np.testing.assert_array_equal(alone.codes[0], together.codes[i])
    with pytest.raises(UserError, match="seed: there are 2 for 3 pictures"):
        model.generate(PROMPTS, seed=[1, 2])


def test_tokens_that_are_taken_back_are_painted_again(model):
    made = model.generate(PROMPTS, seed=1)
    mask = np.zeros((4, 4), bool)
    mask[1:3, 2] = True
    again = model.repaint(made.codes, mask, "a dog", num_images=2, seed=9)
    kept = ~mask.reshape(-1)
    assert again.codes.shape == (3, 2, 16)
    for j in range(2):
        np.testing.assert_array_equal(again.codes[:, j, kept], made.codes[:, 0, kept])
    assert (again.codes[:, :, ~kept] != made.codes[:, :, ~kept]).any()
    alone = model.repaint(made.codes[0, 0], mask, "a dog", num_images=2, seed=9)
    np.testing.assert_array_equal(alone.codes[0], again.codes[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.repaint(np.zeros(15, int), np.ones(15), "x"), r"codes is int64 \[15\]"),
        (lambda m: m.repaint(np.full(16, 32), np.ones(16, bool), "x"), r"codes lies in 32\.\.32"),
        (lambda m: m.repaint(codes(2), codes(2) < 0, "x"), "the mask of picture 0 is empty"),
        (lambda m: m.repaint(codes(2), np.ones((3, 16), bool), "x"), "codes: there are 2 for 3"),
        (lambda m: m.generate("x", initial=np.full(16, 32)), r"initial lies in 32\.\.32"),
    ],
)
def test_impossible_codes_are_named(model, call, message):
    with pytest.raises(UserError, match=message):
        call(model)


@pytest.mark.slow
def test_one_to_sixteen_pictures_are_three_shapes(model):
    networks = model._networks
    programs = (networks.sample, networks.decode, networks.encode)
    for program in programs:
        program.clear_cache()
    for count in range(1, 17):
        made = model.generate("a cat", num_images=count, num_steps=1)
        model.encode_images(made.images)
    sizes = [
        program._cache_size()
        for program in (model._networks.sample, model._networks.decode, model._networks.encode)
    ]
    assert sizes == [3, 3, 3]


def pictures(*sizes):
    draw = np.random.default_rng(4).integers
    return [draw(0, 256, (height, width, 3)).astype(np.uint8) for height, width in sizes]


@pytest.mark.slow
def test_several_pictures_and_prompts_are_painted_at_once(model):
    images = pictures((16, 16), (24, 40))
    masks = [np.zeros((16, 16), bool), np.zeros((24, 40), bool)]
    masks[0][:5], masks[1][:, 16:20] = True, True
    options = {"num_images": 2, "seed": [3, 4]}
    made = model.inpaint(images, masks, ["a cat", "a dog"], **options)
    for i, (prompt, seed) in enumerate((("a cat", 3), ("a dog", 4))):
        alone = model.inpaint(images[i], masks[i], prompt, num_images=2, seed=seed)
        np.testing.assert_array_equal(alone.codes[0], made.codes[i])
    # One picture, and a prompt for each of its new versions.
    both = model.inpaint(images[0], masks[0], ["a cat", "a dog"], **options)
    np.testing.assert_array_equal(both.codes[0], made.codes[0])
    edited = model.edit(images, "a cat", seed=[1, 2], strength=0.4)
    np.testing.assert_array_equal(
        edited.codes[1], model.edit(images[1], "a cat", seed=2, strength=0.4).codes[0]
    )
    with pytest.raises(UserError, match="image: there are 2 for 3 pictures"):
        model.edit(images, ["a", "b", "c"])


def test_untouched_pixels_are_pasted_back_at_the_size_of_the_picture(model):
    images = pictures((16, 16), (24, 40))
    masks = [np.zeros((16, 16), bool), np.zeros((24, 40), bool)]
    masks[0][2:5, 3:9], masks[1][4:20, 10:30] = True, True
    made = model.inpaint(images, masks, "a cat", paste=True, num_images=2)
    plain = model.inpaint(images, masks, "a cat", num_images=2)
    np.testing.assert_array_equal(made.pixels, plain.pixels)
    for k, picture in enumerate(made.images):
        image, mask, found = images[k // 2], masks[k // 2], np.asarray(picture)
        assert found.shape == image.shape
        np.testing.assert_array_equal(found[~mask], image[~mask])
        assert (found[mask] != image[mask]).any()
    # A picture of the model's own size gets the model's pixels.
    np.testing.assert_array_equal(
        np.asarray(made.images[0])[masks[0]], plain.pixels[0, 0][masks[0]]
    )


def test_likelihood_counts_the_bits_of_pictures_and_prompts(model):
    some = codes(3)
    found = model.likelihood(codes=some, prompts=["a cat", "a dog", ""])
    assert found.bits_per_token.shape == (3,)
    np.testing.assert_allclose(found.bits_per_image, 16 * found.bits_per_token)
    alone = model.likelihood(codes=some[1], prompts="a dog")
    np.testing.assert_allclose(alone.bits_per_token[0], found.bits_per_token[1], rtol=1e-5)
    # What the network itself says of one masked token after the other is near the bound.
    assert (found.bits_per_token > 0).all()
    image = pictures((16, 16))[0]
    seen = model.likelihood(image, ["a cat", "a dog"])
    same = model.likelihood(codes=model.encode_images([image]), prompts=["a cat", "a dog"])
    np.testing.assert_array_equal(seen.bits_per_token, same.bits_per_token)
    assert seen.bits_per_token[0] != seen.bits_per_token[1]
    for options, message in (({}, "either images or codes"), ({"num_draws": 11}, "num_draws=11")):
        with pytest.raises(UserError, match=message):
            model.likelihood(codes=None if not options else some, prompts="x", **options)


@pytest.mark.slow
def test_dtypes_and_a_mesh_are_chosen_when_a_model_is_read(model, tmp_path):
    model.save_pretrained(str(tmp_path / "model"))
    plain = model.generate("a cat", seed=2)
    half = type(model).from_pretrained(
        str(tmp_path / "model"), dtype="bfloat16", autoencoder_dtype="bfloat16"
    )
    leaves = jax.tree.leaves(half._networks.params)
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}
    assert half.config.denoiser.dtype == "bfloat16"
    close = half.decode_codes(plain.codes[0]).astype(int) - plain.pixels[0]
    assert 0 < np.abs(close).max() <= 8
    log_x0 = half.predict_log_x0(codes(1), half.encode_text(["a cat"]), np.array([5]))
    exact = model.predict_log_x0(codes(1), model.encode_text(["a cat"]), np.array([5]))
    assert log_x0.dtype == np.float32
    assert 0 < np.abs(log_x0 - exact).max() < 0.5
    mesh = jax.make_mesh((1, 1, 1), sharding.AXES, (AxisType.Auto,) * 3)
    placed = type(model).from_pretrained(str(tmp_path / "model"), mesh=mesh)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(placed._networks.params)} == {mesh}
    np.testing.assert_array_equal(placed.generate("a cat", seed=2).codes, plain.codes)
    with pytest.raises(UserError, match=r"from_pretrained\(\) has no option torch_dtype; .* dtype"):
        type(model).from_pretrained(str(tmp_path / "model"), torch_dtype="bfloat16")
    with pytest.raises(UserError, match="dtype='float16': must be float32 or bfloat16"):
        type(model).from_pretrained(str(tmp_path / "model"), dtype="float16")
