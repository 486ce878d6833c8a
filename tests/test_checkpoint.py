"""Checkpoints in a folder: what counts as damage, and what does not."""

import errno
import os
import pathlib
import shutil
import socket
import subprocess
import sys

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


ROOT = pathlib.Path(__file__).parents[1]
LOAD = """
import sys
import jax, numpy as np
from vqd_jax import checkpoint
from vqd_jax.errors import UserError
port, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
abstract = {"x": np.zeros(2, np.float32)}
try:
    found = checkpoint.load(folder, abstract)
    print("read", found.step, found.state["x"].tolist())
except UserError as error:
    print("refused", error)
"""


def loaded_by_two(folders):
    """What two processes print that load from a folder each, as two views of one storage."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, str(port), str(i), str(folder)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"}, **options,
        )
        for i, folder in enumerate(folders)
    ]  # fmt: skip
    found = [process.communicate(timeout=120) for process in both]
    assert all(out for out, _ in found), found
    return [out.strip().splitlines()[-1] for out, _ in found]


def test_the_first_process_decides_which_checkpoint_is_read(tmp_path):
    saver = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    for step in (5, 10):
        saver.save(tmp_path / "new" / str(step) / "state", {"x": np.full(2, step, np.float32)})
        (tmp_path / "new" / str(step) / "_CHECKPOINT_METADATA").write_text("{}")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    shutil.rmtree(tmp_path / "old/10")
    # The second process sees one more: each read its own newest, and so another state.
    found = loaded_by_two([tmp_path / "old", tmp_path / "new"])
    assert found == ["read 5 [5.0, 5.0]"] * 2
    # The first one sees one that the other cannot read yet: it is not taken for damaged.
    for told in loaded_by_two([tmp_path / "new", tmp_path / "old"]):
        assert told.startswith("refused checkpoint") and "10 cannot be read now" in told
