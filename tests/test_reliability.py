"""Real processes, really killed."""

import functools
import random
import signal
import time

import jax
import numpy as np
import pytest

from configs import tiny
from vqd_jax.training import checkpoint
from vqd_jax.training.state import create_state


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
    ours, theirs = final_state(workdir), final_state(reference)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 100
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    for file in ("samples.png", "autoencoder/model/model.safetensors"):
        assert (workdir / file).read_bytes() == (reference / file).read_bytes(), file


def kill_and_go_on(start, workdir, delays):
    """Starts the run, kills it after each delay in turn, and lets the last one finish."""
    kills = 0
    for delay in [*delays, None]:
        process = start("--config=configs/tiny.py", f"--workdir={workdir}")
        if delay is not None:
            time.sleep(delay)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
                continue
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    return kills


def test_killed_twice_ends_as_if_never_interrupted(start, tiny_run, tmp_path):
    kills = kill_and_go_on(start, tmp_path / "run", [9.0, 7.0])
    assert kills == 2
    assert_same_run(tmp_path / "run", tiny_run)


@pytest.mark.slow
def test_killed_at_many_moments_ends_as_if_never_interrupted(start, tiny_run, tmp_path):
    rng = random.Random(0)
    kills = kill_and_go_on(start, tmp_path / "run", [rng.uniform(2.5, 8.0) for _ in range(14)])
    assert kills >= 10
    assert_same_run(tmp_path / "run", tiny_run)
