"""Real processes, really killed."""

import functools
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from configs import tiny
from vqd_jax import checkpoint
from vqd_jax.training.stage_two import create_state


def final_state(workdir):
    config = tiny.get_config()
    abstract = jax.eval_shape(functools.partial(create_state, config))
    step, state = checkpoint.load(f"{workdir}/checkpoints", checkpoint.abstract(abstract))
    assert step == config.training.num_steps
    state = state.replace(key=jax.random.key_data(state.key))
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def assert_same_run(workdir, reference):
    """The final state, the autoencoder and the pictures are the same to the last bit."""
    ours, theirs = final_state(workdir), final_state(reference)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 100
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    for file in ("samples.png", "autoencoder/model/model.safetensors"):
        assert (workdir / file).read_bytes() == (reference / file).read_bytes(), file


def lines(workdir, text):
    path = workdir / "metrics.jsonl"
    return path.read_text().count(text) if path.exists() else 0


# What a run is doing, seen from outside: true once it has begun, given what there was before.
MOMENTS = {
    "a step of stage one": lambda w, _: (w / "autoencoder" / "metrics.jsonl").exists(),
    "a save of stage one": lambda w, _: any((w / "autoencoder").glob("checkpoints/*-tmp*")),
    "the end of stage one": lambda w, _: (
        (w / "autoencoder" / ".model.tmp").exists() or (w / "autoencoder" / "model").exists()
    ),
    "encoding": lambda w, _: (w / "codes").exists(),
    "a step": lambda w, before: lines(w, "train/loss") > before["train/loss"],
    "a save": lambda w, _: any(w.glob("checkpoints/*-tmp*")),
    "a grid": lambda w, before: lines(w, "validation/bits") > before["validation/bits"],
}


def kill_and_go_on(start, workdir, moments):
    """Starts the run, kills it at each of the moments in turn, and lets the last one finish."""
    for moment in moments:
        before = {text: lines(workdir, text) for text in ("train/loss", "validation/bits")}
        process = start("--config=configs/tiny.py", f"--workdir={workdir}")
        while not MOMENTS[moment](workdir, before):
            assert process.poll() is None, f"never saw {moment}: {process.communicate()[0]}"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start("--config=configs/tiny.py", f"--workdir={workdir}")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output


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
