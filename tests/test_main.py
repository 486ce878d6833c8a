"""The command line as a user meets it: what it does. Mistakes are in test_mistakes.py."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from vqd_jax import modes
from vqd_jax.errors import UserError
from vqd_jax.interop import convert, folder
from vqd_jax.pipeline import VQDiffusion

TINY = "--config=configs/tiny.py"


def test_a_run_leaves_what_the_readme_promises(tiny_run):
    for name in (
        "samples.png",
        "samples/step_0000020.png",
        "autoencoder/reconstructions.png",
        "autoencoder/model/config.json",
        "checkpoints/40/config",
        "config.json",
    ):
        assert (tiny_run / name).exists(), name
    assert len(list((tiny_run / "tensorboard").iterdir())) == 1
    rows = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert sorted(losses) == [10, 20, 30, 40]
    final = rows[-1]
    assert final["step"] == 40
    for split in ("train", "validation"):
        assert 0 < final[f"{split}/bits_per_token"] < 10
        assert 0 < final[f"{split}/bits_per_token_shuffled"] < 10


def test_running_a_finished_run_again_changes_nothing(call, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run, workdir)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    status, output = call(TINY, f"--workdir={workdir}")
    assert status == 0
    assert "nothing is left to do" in output
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_sampling_writes_a_grid_and_single_pictures(call, tiny_run, tmp_path):
    arguments = ("--mode=sample", f"--workdir={tiny_run}", "--num_images=3", "--seed=5")
    prompts = ("--prompt=red heart", "--prompt=")
    status, output = call(*arguments, *prompts, f"--output={tmp_path}/a", "--animate")
    assert status == 0, output
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    stems = [f"000_red-heart_seed5_{j:02d}" for j in range(3)]
    stems += [f"001_no-prompt_seed5_{j:02d}" for j in range(3)]
    wanted = [f"{stem}.{ending}" for stem in stems for ending in ("png", "gif")]
    assert names == sorted([*wanted, "grid_seed5.png"])
    picture = np.asarray(Image.open(tmp_path / "a" / "000_red-heart_seed5_01.png"))
    assert picture.shape == (16, 16, 3)
    with Image.open(tmp_path / "a" / "000_red-heart_seed5_01.gif") as animation:
        assert animation.n_frames == 11

    # The same seed gives the same pictures, whatever else is asked for; another seed others.
    status, output = call(*arguments, "--prompt=red heart", f"--output={tmp_path}/b")
    assert status == 0, output
    again = np.asarray(Image.open(tmp_path / "b" / "000_red-heart_seed5_01.png"))
    np.testing.assert_array_equal(picture, again)
    other = np.asarray(Image.open(tmp_path / "a" / "000_red-heart_seed5_02.png"))
    assert not np.array_equal(picture, other)


def test_a_long_prompt_is_cut_with_a_warning(call, tiny_run, tmp_path):
    long = "a very long prompt " * 30
    status, output = call(
        "--mode=sample", f"--workdir={tiny_run}", f"--prompt={long}", f"--output={tmp_path}"
    )
    assert status == 0, output
    assert "122 ids" in output
    assert "16" in output


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red, red heart!", "a-red-red-heart"),
        ("\u8d64\u3044 \u5fc3", "\u8d64\u3044-\u5fc3"),
        ("\U0001f600", "grinning-face"),
        ("\u2764\ufe0f \U0001f408", "heavy-black-heart-cat"),
        ("", "no-prompt"),
        (" \ue000", "no-prompt"),
    ],
)
def test_files_are_called_by_their_prompt(prompt, name):
    assert modes._slug(prompt) == name


GOLDEN = "tests/golden"


def test_a_published_file_is_converted_sampled_and_given_back(call, tmp_path):
    model = tmp_path / "model"
    convert = ("--mode=convert", f"--target={model}")
    status, output = call(*convert, f"--source={GOLDEN}/diffusers_pipeline")
    assert status == 0, output
    # A line a part: what, how large, from where.
    (line,) = [x for x in output.splitlines() if "denoiser" in x]
    assert "45,043 parameters" in line
    assert "tests/golden/diffusers_pipeline/transformer" in line
    pictures = f"--output={tmp_path}/pictures"
    sample = ("--mode=sample", f"--model={model}", "--prompt=the red boat", pictures)
    status, output = call(*sample, "--num_images=2", "--num_steps=3", "--rule=purity")
    assert status == 0, output
    with Image.open(tmp_path / "pictures" / "000_the-red-boat_seed0_01.png") as picture:
        assert picture.size == (8, 8)
    image = f"--image={tmp_path}/pictures/000_the-red-boat_seed0_01.png"
    status, output = call(*sample, image, f"--mask={tmp_path}/none.png")
    assert status == 1
    assert f"No such file or directory: '{tmp_path}/none.png'" in output
    status, output = call(*sample, image, "--strength=0.5", "--seed=1", "--num_images=1")
    assert status == 0, output
    assert (tmp_path / "pictures" / "grid_seed1.png").exists()
    status, output = call("--mode=export", f"--model={model}", f"--target={tmp_path}/back")
    assert status == 0, output
    status, output = call(
        "--mode=convert", f"--source={tmp_path}/back", f"--target={tmp_path}/again"
    )
    assert status == 0, output
    weights = [(tmp_path / x / "model.safetensors").read_bytes() for x in ("model", "again")]
    assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def golden_model(tmp_path_factory):
    target = str(tmp_path_factory.mktemp("golden") / "model")
    convert.convert(f"{GOLDEN}/diffusers_pipeline", target)
    return target


@pytest.mark.parametrize(
    "words",
    [
        {"times": (0, 2, 4), "guidance_scale": (1.0, 5.0), "rule": "purity", "truncation": 0.8},
        pytest.param(
            {
                "num_steps": 3, "guidance_scale": 9.0, "guidance_ramp": True, "top_k": 9,
                "temperature": 2.0, "negative_prompt": "a boat",
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"published_fast": 2, "guidance_scale": 9.0, "guidance_interval": (0.2, 0.8)},
            marks=pytest.mark.slow,
        ),
        pytest.param({"rule": "high_quality", "calls_per_step": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"num_steps": 2, "start": "schedule", "guidance_scale": 1.0}, marks=pytest.mark.slow
        ),
    ],
)  # fmt: skip
def test_the_flags_of_sampling_are_the_words_of_generate(call, golden_model, tmp_path, words):
    flags = [
        f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in words.items()
    ]
    output = f"--output={tmp_path}"
    prompt = ("--prompt=the red boat", "--num_images=1")
    status, said = call("--mode=sample", f"--model={golden_model}", *prompt, output, *flags)
    assert status == 0, said
    made = VQDiffusion.from_pretrained(golden_model).generate(["the red boat"], **words)
    with Image.open(tmp_path / "000_the-red-boat_seed0_00.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), made.pixels[0, 0])


def test_a_picture_is_painted_from_a_file(call, golden_model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = ("--mode=sample", f"--model={golden_model}", "--prompt=a boat", "--num_images=1")
    begun = (f"--image={tmp_path}/image.png", f"--mask={tmp_path}/mask.png", "--strength=0.5")
    status, said = call(*flags, *begun, "--animate", "--predictions", f"--output={tmp_path}/out")
    assert status == 0, said
    model = VQDiffusion.from_pretrained(golden_model)
    made = model.inpaint(pixels, mask, "a boat", strength=0.5, trajectory=True)
    stem = tmp_path / "out" / "000_a-boat_seed0_00"
    with Image.open(f"{stem}.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), made.pixels[0, 0])
    for ending in (".gif", "_predictions.gif"):
        with Image.open(f"{stem}{ending}") as animation:
            # Frames that are equal are stored as one.
            assert 1 < animation.n_frames <= 1 + len(made.trajectory)
    for missing in ("--mask=mask.png", "--strength=0.5"):
        status, said = call(*flags, missing, f"--output={tmp_path}/none")
        assert status == 1
        assert f"{missing.partition('=')[0]} needs the picture that it belongs to" in said


def test_pictures_and_masks_are_painted_pasted_and_judged(call, golden_model, tmp_path):
    draw = np.random.default_rng(0).integers
    images = [draw(0, 256, (height, 12, 3)).astype(np.uint8) for height in (10, 16)]
    masks = [np.zeros(image.shape[:2], np.uint8) for image in images]
    flags = [f"--model={golden_model}", "--prompt=a boat", "--prompt=a red boat"]
    for k, (image, mask) in enumerate(zip(images, masks, strict=True)):
        mask[:5, 3:6] = 255
        Image.fromarray(image).save(tmp_path / f"image{k}.png")
        Image.fromarray(mask).save(tmp_path / f"mask{k}.png")
    given = [f"--image={tmp_path}/image{k}.png" for k in range(2)]
    painted = [f"--mask={tmp_path}/mask{k}.png" for k in range(2)]
    status, said = call(
        "--mode=sample", *flags, *given, *painted, "--paste", "--num_images=1", "--preview_steps=2",
        "--mesh=1,1,1", f"--output={tmp_path}/out",
    )  # fmt: skip
    assert status == 0, said
    names = ["000_a-boat_seed0_00.png", "001_a-red-boat_seed0_00.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *names, "grid_seed0.png", "preview_seed0.png",
    ]  # fmt: skip
    for name, image, mask in zip(names, images, masks, strict=True):
        found = np.asarray(Image.open(tmp_path / "out" / name))
        np.testing.assert_array_equal(found[mask == 0], image[mask == 0])
        assert (found[mask > 0] != image[mask > 0]).any()
    status, said = call("--mode=likelihood", *flags, *given, "--num_draws=3", "--seed=4")
    assert status == 0, said
    model = VQDiffusion.from_pretrained(golden_model)
    bits = model.likelihood(images, ["a boat", "a red boat"], num_draws=3, seed=4)
    for k, prompt in enumerate(("a boat", "a red boat")):
        token, whole = bits.bits_per_token[k], bits.bits_per_image[k]
        line = f"image{k}.png '{prompt}': {token:.4f} bits a token, {whole:.1f} bits a picture"
        assert line in said
    for wrong, message in (
        (["--paste", "--prompt=x"], "--paste needs the picture"),
        (["--paste", "--prompt=x", given[0]], "--paste needs --mask=FILE"),
        (["--mesh=1,2", "--prompt=x"], "--mesh=1,2: must be three sizes, of data, fsdp, tensor"),
        (["--mesh=1,2,1", "--prompt=x"], "but there are 1 devices"),
    ):
        status, said = call("--mode=sample", flags[0], *wrong, f"--output={tmp_path}/none")
        assert status == 1
        assert message in said


def test_a_run_becomes_a_model_folder(call, tiny_run, tmp_path):
    target = tmp_path / "model"
    flags = ("--mode=export", f"--workdir={tiny_run}", f"--target={target}", "--format=vqd_jax")
    status, output = call(*flags)
    assert status == 0, output
    run, model = (VQDiffusion.from_pretrained(str(x)) for x in (tiny_run, target))
    assert run.fingerprint() == model.fingerprint()
    status, output = call(*flags, "--dtype=bfloat16")
    assert status == 0, output
    assert (target / "model.safetensors").stat().st_size < 0.52 * 4 * _parameters(run)
    status, output = call(*flags[:-1], "--dtype=bfloat16")
    assert status == 1 and "--dtype=bfloat16 belongs to --format=vqd_jax" in output


def _parameters(model):
    return sum(x.size for x in jax.tree.leaves(model._networks.params)) + sum(
        x.size for x in jax.tree.leaves(model._networks.autoencoder_params)
    )


@pytest.mark.slow
def test_adapters_are_trained_and_handed_around(call, tiny_run, tmp_path):
    flags = (TINY, f"--workdir={tmp_path}/run", f"--config.training.init_from={tiny_run}")
    flags += (f"--config.autoencoder.path={tiny_run}", "--config.training.adapter_rank=2")
    status, output = call(*flags, "--config.training.num_steps=5")
    assert status == 0, output
    flags = ("--mode=export", f"--workdir={tmp_path}/run", "--format=adapters")
    status, output = call(*flags, f"--target={tmp_path}/small")
    assert status == 0, output
    run, small = (VQDiffusion.from_pretrained(str(tmp_path / x)) for x in ("run", "small"))
    assert run.fingerprint() == small.fingerprint()
    assert run.fingerprint() != VQDiffusion.from_pretrained(str(tiny_run)).fingerprint()
    whole = ("--mode=export", f"--workdir={tmp_path}/run", "--format=vqd_jax")
    status, output = call(*whole, f"--target={tmp_path}/whole")
    assert status == 0, output
    described = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert described["autoencoder"]["path"] == ""
    assert VQDiffusion.from_pretrained(str(tmp_path / "whole")).fingerprint() == run.fingerprint()
    file = tmp_path / "small" / "model.safetensors"
    assert file.stat().st_size < 0.1 * 4 * _parameters(run)
    described = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps(described | {"base": "nowhere"}))
    with pytest.raises(UserError, match="holds adapters of the model nowhere: nowhere is no mod"):
        VQDiffusion.from_pretrained(str(tmp_path / "small"))
    status, output = call(*flags[:1], f"--workdir={tiny_run}", *flags[2:], f"--target={tmp_path}/x")
    assert status == 1 and "trained all parameters: export it with --format=vqd_jax" in output


@pytest.mark.slow
def test_a_decoder_that_was_trained_further_is_put_in(call, tiny_run, tmp_path):
    run, folder_of_run = VQDiffusion.from_pretrained(str(tiny_run)), tiny_run / "autoencoder/model"
    params = jax.tree.map(np.array, run._networks.autoencoder_params)
    params["decoder"]["conv_out"]["bias"] += 0.25
    described = json.loads((folder_of_run / "config.json").read_text())
    folder.save(tmp_path / "better", described, params)
    flags = ("--mode=export", f"--workdir={tiny_run}", "--format=vqd_jax")
    given = f"--autoencoder={tmp_path}/better"
    status, output = call(*flags, f"--target={tmp_path}/model", given)
    assert status == 0, output
    new = VQDiffusion.from_pretrained(str(tmp_path / "model"))
    made = [m.generate(["red heart"], num_steps=2, num_images=1) for m in (run, new)]
    np.testing.assert_array_equal(made[0].codes, made[1].codes)
    assert made[1].pixels.mean() > made[0].pixels.mean() + 5
    params["quantize"]["embedding"][0] += 1.0
    folder.save(tmp_path / "better", described, params)
    status, output = call(*flags, f"--target={tmp_path}/other", given)
    assert status == 1 and "has other codes than the model: its quantize differs" in output
    assert not (tmp_path / "other").exists()
