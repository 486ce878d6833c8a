"""The command line as a user meets it: what it does, and what it says when something is wrong."""

import json
import os
import pickle
import re
import resource
import shutil
import time
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

from vqd_jax import config as config_lib
from vqd_jax import main, modes
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
    ("text", "message"),
    [
        ("def", "SyntaxError"),
        ("a = b", "NameError: name 'b'"),
        ("import nothing_at_all", "nothing_at"),
    ],
)
def test_a_config_that_is_no_program_is_one_line(call, tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    status, output = call(f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run")
    assert status == 1
    assert "the file of --config is no program" in output and message in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([TINY, "--config.training.nums_steps=3", "--workdir=W"], "nums_steps"),
        ([TINY, "--config.training.num_steps=many", "--workdir=W"], "num_steps"),
        (["--config=configs/none.py", "--workdir=W"], "configs/none.py"),
        ([TINY], "--workdir is missing"),
        (["--workdir=W"], "--config is missing"),
        ([TINY, "--workdir=W", "--mode=fly"], "fly"),
        ([TINY, "--workdir=gs://bucket/run"], "--config.training.checkpoints"),
        (["--mode=sample", "--workdir=W", "--times=0,x"], "--times=0,x"),
        ([TINY, "--workdir=W", "extra"], "unexpected argument 'extra'"),
        ([TINY, "--workdir=W", "--config.data.name=mnist"], "config.data.name='mnist'"),
        ([TINY, "--workdir=W", "--config.data.image_size=18"], "must be a multiple of 4"),
        ([TINY, "--workdir=W", "--config.autoencoder.path=none"], "none"),
        (["--mode=sample", "--workdir=W", "--prompt=x"], "is no model folder and no workdir"),
        (["--mode=sample", "--workdir=RUN"], "give at least one --prompt"),
        (["--mode=sample", "--workdir=RUN", "--prompt=x", "--num_images=0"], "num_images=0"),
        (["--mode=sample", "--workdir=RUN", "--prompt=x", "--num_steps=11"], "num_steps=11"),
        (["--mode=sample", "--workdir=RUN", "--prompt=x", "--seed=-1"], "seed=-1"),
        ([TINY, "--workdir=RUN", "--config.denoiser.width=64"], "denoiser.width: 32 -> 64"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(call, tiny_run, tmp_path, flags, message):
    workdir = tmp_path / "w"
    flags = [f.replace("=W", f"={workdir}").replace("=RUN", f"={tiny_run}") for f in flags]
    status, output = call(*flags)
    assert status == 1, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in output
    assert not workdir.exists() or sorted(p.name for p in workdir.iterdir()) in (
        ["samples"],
        [".lock", "config.json"],
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode=sample", "--prompt=x", "--model=~/$RUN"], "HOME/seven is no model folder"),
        (["--mode=sample", "--prompts=$HOME/$RUN"], "HOME/seven cannot be read as a file of prom"),
        ([TINY, "--workdir=~/w", "--config.autoencoder.path=~/$RUN"], "HOME/seven is not a model"),
        ([TINY, "--workdir=~/w", "--config.data.more_codes=('~/$RUN',)"], "HOME/seven/train has"),
        (
            [TINY, "--mode=prepare", "--config.data.name=ffhq_images", "--config.data.dir=~/$RUN"],
            "there is no directory HOME/seven",
        ),
    ],
)
def test_paths_of_flags_and_fields_are_expanded_alike(call, tmp_path, monkeypatch, flags, message):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUN", "seven")
    status, output = call(*flags)
    assert status == 1
    assert message.replace("HOME", str(tmp_path)) in output
    assert not list(tmp_path.rglob("~*"))


def test_every_field_that_is_a_path_is_expanded():
    """By its name; those of another program or of a pattern are none."""
    words = re.compile(
        r"(^|_)(dir|path|codes|init_from|checkpoints|cache|clip|inception(_statistics)?)$"
    )
    flat = config_lib.flatten(config_lib.default_config())
    found = {
        key
        for key, value in flat.items()
        if isinstance(value, str | tuple | list) and words.search(key.split(".")[1])
    }
    assert found == set(main._PATH_FIELDS)


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


def test_a_mistake_can_be_put_right_in_the_same_workdir(call, tmp_path):
    workdir = f"--workdir={tmp_path}/run"
    status, output = call(TINY, workdir, "--config.autoencoder.batch_size=100000")
    assert status == 1
    assert "lower the batch size" in output
    status, output = call(TINY, workdir, "--config.training.batch_size=5000")
    assert status == 1
    assert "lower the batch size" in output
    status, output = call(TINY, workdir, "--config.training.num_steps=1")
    assert status == 0, output


def test_damage_to_a_workdir_is_named(call, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run, workdir)
    sample = ("--mode=sample", f"--workdir={workdir}", "--prompt=x")
    for path in (workdir / "checkpoints").rglob("*"):
        if path.is_file() and "state" in path.parts:
            path.write_bytes(path.read_bytes()[:-20])
    status, output = call(*sample)
    assert status == 1
    assert f"no checkpoint in {workdir}/checkpoints can be read" in output
    assert "Traceback" not in output
    model = workdir / "autoencoder" / "model" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:1000])
    status, output = call(*sample)
    assert status == 1
    assert "model.safetensors is cut short" in output
    (workdir / "config.json").write_text("{")
    status, output = call(*sample)
    assert status == 1
    assert f"{workdir}/config.json is damaged" in output
    assert "Traceback" not in output


def test_a_workdir_that_cannot_be_made_is_named(call, tmp_path):
    (tmp_path / "file").write_text("in the way")
    status, output = call(TINY, f"--workdir={tmp_path}/file/run")
    assert status == 1
    assert f"{tmp_path}/file/run" in output
    assert "Traceback" not in output


def limit_file_size():
    # Fails the same writes as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.parametrize(
    "missing",
    [
        "checkpoints",
        pytest.param("codes", marks=pytest.mark.slow),
        pytest.param("autoencoder/model", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_is_full_ends_the_run_with_a_message(run, tiny_run, tmp_path, missing):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run, workdir)
    shutil.rmtree(workdir / missing)
    # Without checkpoints all steps are left, and their programs are compiled already.
    more = () if missing == "checkpoints" else ("--config.training.num_steps=41",)
    flags = (TINY, f"--workdir={workdir}", *more)
    status, output = run(*flags, preexec_fn=limit_file_size)
    assert status == 1, output
    # The checkpoint library's own threads may complain before it, and once more as they end.
    (message,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "too large" in message or "written" in message
    status, output = run(*flags)
    assert status == 0, output


def test_a_disk_that_is_full_leaves_no_data_set(run, environment, tmp_path):
    data = f"--config.data.dir={tmp_path}/data"
    status, output = run(TINY, f"--workdir={tmp_path}/run", data, preexec_fn=limit_file_size)
    assert status == 1, output
    assert "cannot prepare emoji_text" in output
    assert "Traceback" not in output
    assert not (tmp_path / "data" / "emoji_text" / "1.0.0").exists()


def test_two_runs_do_not_share_a_workdir(start, run, tmp_path):
    flags = (TINY, f"--workdir={tmp_path}/run")
    process = start(*flags)
    while not (tmp_path / "run" / "config.json").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    status, output = run(*flags)
    process.kill()
    process.communicate()
    assert status == 1
    assert "another run is at work" in output


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
        {
            "num_steps": 3, "guidance_scale": 9.0, "guidance_ramp": True, "top_k": 9,
            "temperature": 2.0, "negative_prompt": "a boat",
        },
        {"published_fast": 2, "guidance_scale": 9.0, "guidance_interval": (0.2, 0.8)},
        {"rule": "high_quality", "calls_per_step": 2},
        {"num_steps": 2, "start": "schedule", "guidance_scale": 1.0},
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


@pytest.mark.parametrize("flags", [("--mode=sample", "--model=M", "--prompt=x"), ("--mode=plan",)])
def test_a_backend_that_is_not_there_is_one_line(run, flags):
    config = () if "--prompt=x" in flags else ("--config=configs/tiny.py",)
    status, output = run(*flags, *config, env={"JAX_PLATFORMS": "cuda"})
    assert status == 1
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: JAX has no backend for JAX_PLATFORMS=cuda")
    assert "JAX_PLATFORMS=cpu" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("error", "message", "is_defect"),
    [
        (
            ZeroDivisionError("of no use"),
            "this is a defect of vqd_jax, not of what you asked",
            True,
        ),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
            "memory is not enough (RESOURCE_EXHAUSTED: Out of memory)",
            False,
        ),
    ],
)
def test_only_a_defect_shows_where_it_is(
    call, tiny_run, tmp_path, monkeypatch, error, message, is_defect
):
    def fail(*args, **kwargs):
        raise error

    # A library that fails in a way that nobody foresaw.
    monkeypatch.setattr("PIL.Image.fromarray", fail)
    flags = ("--mode=sample", f"--workdir={tiny_run}", "--prompt=x", "--num_images=1")
    status, output = call(*flags, f"--output={tmp_path}")
    assert status == 1
    assert output.strip().splitlines()[-1].startswith(f"error: {message}")
    assert ("Traceback" in output) == is_defect


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


def test_a_hostile_file_is_refused_by_name(call, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "executed"),)

    with zipfile.ZipFile(tmp_path / "evil.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": Payload()}, protocol=2))
    source, target = f"--source={tmp_path}/evil.pth", f"--target={tmp_path}/model"
    status, output = call("--mode=convert", source, target)
    assert status == 1
    assert "posix.system, which could run code" in output
    assert "Traceback" not in output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pth"]
