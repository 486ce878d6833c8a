"""The loop on a task that takes no time: it resumes, saves, evaluates and stops as it should."""

import dataclasses
import json
import os
import shutil
import signal

import flax.struct
import grain
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vqd_jax.checkpoint import Checkpoints, abstract
from vqd_jax.errors import UserError
from vqd_jax.parallel import sharding
from vqd_jax.training import loop
from vqd_jax.training.task import Task

MESH = sharding.make_mesh(ConfigDict({"mesh": {"data": 1, "fsdp": 1, "tensor": 1}}))


class State(flax.struct.PyTreeNode):
    step: jax.Array
    total: jax.Array
    key: jax.Array


def create():
    return State(jnp.zeros((), jnp.int32), jnp.zeros(1000), jax.random.key(7))


def step(state, batch, bad_step=-1):
    noise = jax.random.normal(jax.random.fold_in(state.key, state.step), (1000,))
    total = state.total * 0.9 + batch.sum() + noise
    loss = jnp.where(state.step + 1 == bad_step, jnp.nan, total.mean())
    return state.replace(step=state.step + 1, total=total), {
        "loss": loss,
        "gradient_norm": jnp.float32(1.0),
    }


def dataset():
    return grain.MapDataset.range(50).seed(0).shuffle().repeat().batch(4).to_iter_dataset()


class Sum(Task):
    name, prefix = "test", "train"

    def __init__(self, evaluate, bad_step):
        self.batches = dataset()
        self._evaluate, self._bad_step = evaluate, bad_step

    def create_state(self):
        return create()

    def train_step(self, state, batch, placement):
        return step(state, batch, self._bad_step)

    def evaluate(self, *args):
        if self._evaluate:
            self._evaluate(*args)


SCHEDULE = loop.Schedule(
    num_steps=20, batch_size=4, log_every=2, eval_every=1, save_every=5, keep_checkpoints=2
)


def place_in(directory):
    return loop.Place(str(directory), f"{directory}/checkpoints", MESH, ConfigDict({"a": 1}))


def fit(directory, num_steps=20, evaluate=None, bad_step=-1):
    schedule = dataclasses.replace(SCHEDULE, num_steps=num_steps)
    return loop.fit(Sum(evaluate, bad_step), schedule, place_in(directory))


def metrics(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["train/loss"] for row in map(json.loads, lines)}


class Stop(Exception):
    pass


def stop_at(step):
    def evaluate(current, *_):
        if current == step:
            raise Stop

    return evaluate


def test_a_run_that_broke_off_ends_as_the_one_that_did_not(tmp_path):
    whole = fit(tmp_path / "whole")
    for at in (3, 7, 18):
        with pytest.raises(Stop):
            fit(tmp_path / "parts", evaluate=stop_at(at))
    parts = fit(tmp_path / "parts")
    np.testing.assert_array_equal(whole.total, parts.total)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert sorted(metrics(tmp_path / "whole")) == list(range(2, 21, 2))


@pytest.mark.parametrize("steps_per_call", [3, 64])
def test_the_last_call_has_the_steps_that_are_left(tmp_path, steps_per_call):
    schedule = dataclasses.replace(SCHEDULE, steps_per_call=steps_per_call)
    # The second start goes on from a step that is no multiple.
    for num_steps in (11, 20):
        several = dataclasses.replace(schedule, num_steps=num_steps)
        found = loop.fit(Sum(None, -1), several, place_in(tmp_path / "several"))
        expected = fit(tmp_path / "one", num_steps)
        assert int(found.step) == num_steps
        # A scan may order the sums of a step in another way.
        np.testing.assert_allclose(found.total, expected.total, rtol=1e-5, atol=1e-5)
    logged, wanted = metrics(tmp_path / "several"), metrics(tmp_path / "one")
    assert {11, 20} <= set(logged) <= {*range(21)}
    for step, loss in logged.items():
        assert loss == pytest.approx(wanted.get(step, loss), rel=1e-5)
    saved = sorted(p.name for p in (tmp_path / "several" / "checkpoints").iterdir())
    assert saved[-1] == "20" and len(saved) == 2


def test_the_saved_state_is_not_touched_by_later_steps(tmp_path):
    # The write goes on in the background while later steps overwrite donated buffers.
    at_fifteen = fit(tmp_path / "short", num_steps=15)
    fit(tmp_path / "long", num_steps=20)
    shutil.rmtree(tmp_path / "long" / "checkpoints" / "20")
    checkpoints = Checkpoints(str(tmp_path / "long" / "checkpoints"))
    state = checkpoints.restore(abstract(jax.eval_shape(create)), iter(dataset()))
    assert int(state.step) == 15
    np.testing.assert_array_equal(state.total, at_fifteen.total)


def test_a_step_without_a_finite_loss_is_neither_logged_nor_evaluated(tmp_path):
    evaluated = []
    with pytest.raises(UserError, match="at step 12"):
        fit(tmp_path, bad_step=12, evaluate=lambda step, *_: evaluated.append(step))
    assert evaluated == list(range(1, 12))
    assert sorted(metrics(tmp_path)) == [2, 4, 6, 8, 10]


def test_a_trace_has_the_calls_after_the_third(tmp_path):
    seen = []
    schedule = dataclasses.replace(SCHEDULE, num_steps=7, profile_steps=2)
    traces = (tmp_path / "profile").rglob

    def evaluate(*_):
        seen.append(len(list(traces("*.xplane.pb"))))

    loop.fit(Sum(evaluate, -1), schedule, place_in(tmp_path))
    assert seen == [0, 0, 0, 0, 1, 1, 1]


def test_sigterm_in_the_last_step_still_ends_the_run(tmp_path):
    def evaluate(step, *_):
        if step == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(loop.Terminated, match="at step 20"):
        fit(tmp_path, evaluate=evaluate)
    assert Checkpoints(str(tmp_path / "checkpoints")).latest_step == 20


class Signalled(Sum):
    """Gets SIGTERM within a step, before what is due after it."""

    def __init__(self, evaluate, at):
        super().__init__(evaluate, -1)
        self._at = at

    def train_step(self, state, batch, placement):
        def stop(step):
            if step == self._at:
                os.kill(os.getpid(), signal.SIGTERM)
            return np.float32(0)

        state, metrics = super().train_step(state, batch, placement)
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        zero = jax.experimental.io_callback(stop, shape, state.step)
        return state, metrics | {"loss": metrics["loss"] + zero}


@pytest.mark.parametrize("at", [10, 20])
def test_an_evaluation_that_sigterm_left_no_time_for_is_made_up_for(tmp_path, at):
    evaluated = []

    def evaluate(step, state, writer):
        assert int(state.step) == step
        evaluated.append(step)

    place = place_in(tmp_path)
    schedule = dataclasses.replace(SCHEDULE, eval_every=5, save_every=1000)
    with pytest.raises(loop.Terminated, match=f"at step {at}"):
        loop.fit(Signalled(evaluate, at), schedule, place)
    assert evaluated == list(range(5, at, 5))
    for _ in range(2):
        loop.fit(Signalled(evaluate, -1), schedule, place)
    assert evaluated == [5, 10, 15, 20]


def test_a_loss_that_is_not_finite_stops_with_step_and_checkpoint(tmp_path):
    with pytest.raises(UserError, match="at step 13") as error:
        fit(tmp_path, bad_step=13)
    assert "last good checkpoint is" in str(error.value)
    assert str(tmp_path / "checkpoints" / "10") in str(error.value)
    assert int(fit(tmp_path).step) == 20


def test_a_bad_loss_at_a_save_is_not_saved(tmp_path):
    with pytest.raises(UserError, match="at step 10"):
        fit(tmp_path, bad_step=10)
    assert Checkpoints(str(tmp_path / "checkpoints")).latest_step == 5


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path):
    whole = fit(tmp_path / "whole")
    fit(tmp_path / "run")
    damaged = [
        path
        for path in (tmp_path / "run" / "checkpoints" / "20" / "state").rglob("*")
        if path.is_file()
    ]
    for path in damaged:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again = fit(tmp_path / "run")
    np.testing.assert_array_equal(whole.total, again.total)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["15", "20", "20.damaged"]


def test_nothing_readable_is_an_error_that_names_the_place(tmp_path):
    fit(tmp_path)
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file() and "state" in path.parts:
            path.write_bytes(b"")
    with pytest.raises(UserError, match=r"can be read \(steps 20, 15"):
        fit(tmp_path)


@pytest.mark.slow
def test_a_longer_run_goes_on_from_the_shorter_one(tmp_path):
    whole = fit(tmp_path / "whole", num_steps=20)
    fit(tmp_path / "parts", num_steps=10)
    parts = fit(tmp_path / "parts", num_steps=20)
    np.testing.assert_array_equal(whole.total, parts.total)
