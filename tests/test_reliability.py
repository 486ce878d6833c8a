"""Real processes, really killed."""

import functools
import json
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from configs import tiny
from vqd_jax import checkpoint
from vqd_jax.parallel import sharding
from vqd_jax.training.stage_one import AutoencoderTask
from vqd_jax.training.stage_two import create_state

TINY = ("--config=configs/tiny.py",)


def final_state(checkpoints, create, num_steps):
    """Every array of the last checkpoint, by its path in the state that ``create`` makes."""
    abstract = jax.eval_shape(create)
    step, state = checkpoint.load(str(checkpoints), checkpoint.abstract(abstract))
    assert step == num_steps
    state = state.replace(key=jax.random.key_data(state.key))
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def assert_same(workdir, reference, create, num_steps, files):
    """The state at the end and the files are the same to the last bit; returns names of arrays."""
    ours, theirs = (
        final_state(folder / "checkpoints", create, num_steps) for folder in (workdir, reference)
    )
    assert ours.keys() == theirs.keys()
    assert len(ours) > 100
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    for file in files:
        assert (workdir / file).read_bytes() == (reference / file).read_bytes(), file
    return ours.keys()


def assert_same_run(workdir, reference):
    """The final state, the autoencoder and the pictures are the same to the last bit."""
    config = tiny.get_config()
    create = functools.partial(create_state, config)
    files = ("samples.png", "autoencoder/model/model.safetensors")
    assert_same(workdir, reference, create, config.training.num_steps, files)


def lines(workdir, text):
    paths = (workdir / "metrics.jsonl", workdir / "autoencoder" / "metrics.jsonl")
    return sum(path.read_text().count(text) for path in paths if path.exists())


# What a run is doing, seen from outside: true once it has begun, given what there was before.
MOMENTS = {
    "a step of stage one": lambda w, _: (w / "autoencoder" / "metrics.jsonl").exists(),
    "a later step of stage one": lambda w, before: (
        lines(w, "autoencoder/loss") > before["autoencoder/loss"]
    ),
    "a save of stage one": lambda w, _: any((w / "autoencoder").glob("checkpoints/*-tmp*")),
    "the end of stage one": lambda w, _: (
        (w / "autoencoder" / ".model.tmp").exists() or (w / "autoencoder" / "model").exists()
    ),
    "encoding": lambda w, _: (w / "codes").exists(),
    "a step": lambda w, before: lines(w, "train/loss") > before["train/loss"],
    "a save": lambda w, _: any(w.glob("checkpoints/*-tmp*")),
    "a grid": lambda w, before: lines(w, "validation/bits") > before["validation/bits"],
}


def kill_and_go_on(start, workdir, moments, flags=TINY):
    """Starts the run, kills it at each of the moments in turn, and lets the last one finish."""
    counted = ("autoencoder/loss", "train/loss", "validation/bits")
    for moment in moments:
        before = {text: lines(workdir, text) for text in counted}
        process = start(*flags, f"--workdir={workdir}")
        while not MOMENTS[moment](workdir, before):
            assert process.poll() is None, f"never saw {moment}: {process.communicate()[0]}"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start(*flags, f"--workdir={workdir}")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output


@pytest.mark.slow
def test_killed_twice_ends_as_if_never_interrupted(start, tiny_run, tmp_path):
    kill_and_go_on(start, tmp_path / "run", ["a save of stage one", "a grid"])
    assert_same_run(tmp_path / "run", tiny_run)


@pytest.mark.slow
def test_killed_at_every_moment_ends_as_if_never_interrupted(start, tiny_run, tmp_path):
    moments = [
        *("a step of stage one", "a save of stage one", "a save of stage one"),
        *("the end of stage one", "encoding", "a save", "a step", "a save", "a grid", "a save"),
        *("a step", "a save", "a grid"),
    ]
    kill_and_go_on(start, tmp_path / "run", moments)
    assert_same_run(tmp_path / "run", tiny_run)


# Both networks of stage one. The discriminator begins after the first checkpoint.
JUDGED = {
    "num_steps": 40, "adversarial_weight": 0.2, "adversarial_start": 7, "lecam_weight": 0.1,
    "ema_decay": 0.9, "discriminator_channels": 8, "discriminator_layers": 1,
}  # fmt: skip


@pytest.mark.slow
def test_killed_tokenizer_with_a_discriminator_ends_as_if_never_interrupted(start, run, tmp_path):
    config = tiny.get_config()
    config.autoencoder.update(JUDGED)
    flags = [f"--config.autoencoder.{name}={value}" for name, value in JUDGED.items()]
    flags = (*TINY, "--mode=train_autoencoder", "--config.training.log_every=1", *flags)
    status, output = run(*flags, f"--workdir={tmp_path}/whole")
    assert status == 0, output
    moments = [
        *("a step of stage one", "a save of stage one", "a later step of stage one"),
        *("a save of stage one", "a later step of stage one", "the end of stage one"),
    ]
    kill_and_go_on(start, tmp_path / "run", moments, flags)
    create = AutoencoderTask(config, sharding.make_mesh(config)).create_state
    files = ("model/model.safetensors", "reconstructions.png")
    ours, whole = (tmp_path / name / "autoencoder" for name in ("run", "whole"))
    names = assert_same(ours, whole, create, JUDGED["num_steps"], files)
    for part in ("params", "opt_state", "lecam"):
        assert any(name.startswith(f".discriminator.{part}") for name in names), part
    assert losses(ours) == losses(whole)


def losses(directory):
    """Step, loss and the discriminator's loss of all lines of metrics.jsonl that have them."""
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    names = ("step", "autoencoder/loss", "autoencoder/discriminator_loss")
    found = [tuple(row[name] for name in names) for row in rows if names[1] in row]
    assert [row[0] for row in found] == list(range(1, JUDGED["num_steps"] + 1))
    return found


def test_sigterm_saves_and_the_run_goes_on(start, run, tiny_run, tmp_path):
    for done in ("autoencoder", "codes"):
        shutil.copytree(tiny_run / done, tmp_path / "run" / done)
    # Without regular saves: what is there to go on from, the signal has saved.
    flags = ("--config=configs/tiny.py", f"--workdir={tmp_path}/run")
    process = start(*flags, "--config.training.save_every=1000")
    while not lines(tmp_path / "run", "train/loss"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    (saved,) = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved < 40
    assert f"stopped by SIGTERM at step {saved}" in output
    status, output = run(*flags)
    assert status == 0, output
    assert f"goes on from step {saved}" in output
    assert_same_run(tmp_path / "run", tiny_run)
