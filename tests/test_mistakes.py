"""What the command line says when something is wrong, and what it leaves behind."""

import os
import pickle
import re
import resource
import shutil
import time
import zipfile

import jax
import pytest

from vqd_jax import config as config_lib
from vqd_jax import main

TINY = "--config=configs/tiny.py"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def", "SyntaxError"),
        ("a = b", "NameError: name 'b'"),
        ("import nothing_at_all", "nothing_at"),
    ],
)
def test_a_config_file_that_fails_is_one_line(call, tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    status, output = call(f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run")
    assert status == 1
    assert "the file of --config fails" in output and message in output
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["checkpoints", "codes", "autoencoder/model"])
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
