"""Checkpoints in a folder: what counts as damage, and what does not."""

import errno

import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from vqd_jax import checkpoint
from vqd_jax.errors import UserError


class State(flax.struct.PyTreeNode):
    step: jax.Array
    params: dict
    key: jax.Array


def state(step, **params):
    arrays = {name: jnp.full(shape, step, jnp.float32) for name, shape in params.items()}
    return State(jnp.int32(step), arrays, jax.random.key(0))


def abstract(**params):
    return checkpoint.abstract(jax.eval_shape(lambda: state(0, **params)))


def iterator():
    return iter(grain.MapDataset.range(9).to_iter_dataset())


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1 and 2 with a parameter w of shape [3]."""
    checkpoints = checkpoint.Checkpoints(str(tmp_path / "checkpoints"))
    for step in (1, 2):
        checkpoints.save(step, state(step, w=(3,)), iterator(), {"a": step})
    checkpoints.wait()
    yield checkpoints
    checkpoints.close()


def failing(monkeypatch, error, times):
    """Reads of checkpoints fail so many times. Returns the list of the failures so far."""
    monkeypatch.setattr(checkpoint.time, "sleep", lambda _: None)
    read, failures = ocp.CheckpointManager.restore, []

    def restore(self, *args, **kwargs):
        if len(failures) < times:
            failures.append(error)
            raise error
        return read(self, *args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)
    return failures


def names(saved):
    return sorted(path.name for path in saved.directory.iterdir())


ERRORS = pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
        ValueError("UNAVAILABLE: Error reading gs://bucket: failed to connect"),
    ],
    ids=["EIO", "ESTALE", "UNAVAILABLE"],
)


@ERRORS
def test_an_error_that_passes_is_no_damage(saved, monkeypatch, error):
    failing(monkeypatch, error, times=2)
    found = saved.restore(abstract(w=(3,)), iterator())
    np.testing.assert_array_equal(found.params["w"], 2.0)
    assert names(saved) == ["1", "2"]


@ERRORS
def test_an_error_that_stays_stops_and_leaves_the_checkpoint(saved, monkeypatch, error):
    failures = failing(monkeypatch, error, times=100)
    with pytest.raises(UserError, match="checkpoints/2 cannot be read now: .*same command"):
        saved.restore(abstract(w=(3,)), iterator())
    assert len(failures) == 3
    assert names(saved) == ["1", "2"]


def test_another_model_is_told_by_the_names_of_its_arrays(saved):
    told = (
        r"checkpoints/2 is of another model \(params.v: None -> \(2,\); "
        r"params.w: \(3,\) -> \(4,\)\)"
    )
    with pytest.raises(UserError, match=told):
        saved.restore(abstract(w=(4,), v=(2,)), iterator())
    assert names(saved) == ["1", "2"]
    with pytest.raises(UserError, match=r"another model \(params.w: \(3,\) -> \(4,\)\)"):
        checkpoint.load(saved.directory, {"params": abstract(w=(4,)).params})


def test_a_part_of_a_state_is_read(saved):
    step, found = checkpoint.load(saved.directory, {"params": abstract(w=(3,)).params})
    assert step == 2
    np.testing.assert_array_equal(found["params"]["w"], 2.0)
