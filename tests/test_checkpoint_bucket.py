"""Checkpoints in a bucket, which is served on this machine; real processes, really killed."""

import shutil
import signal
import time

import pytest

from tests.test_reliability import assert_same_run
from vqd_jax import checkpoint
from vqd_jax.errors import UserError


@pytest.mark.slow
def test_a_run_killed_while_it_saves_to_a_bucket_goes_on(start, run, tiny_run, bucket, tmp_path):
    workdir = tmp_path / "run"
    flags = ("--config=configs/tiny.py", f"--workdir={workdir}")
    flags = (*flags, "--config.training.checkpoints=gs://bucket/run")
    # What is left when the first save is cut off.
    bucket.write("run/5/state/manifest.ocdbt", b"cut off")
    begun, complete = bucket.steps("run")
    while begun == complete or not complete:  # Again, if it was faster than the signal.
        process = start(*flags, env=bucket.env)
        while not (seen := bucket.steps("run"))[1] or seen[0] == seen[1]:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        begun, complete = bucket.steps("run")

    status, output = run(*flags, env=bucket.env)
    assert status == 0, output
    assert f"goes on from step {max(complete)}" in output
    assert bucket.steps("run") == ({35, 40}, {35, 40})
    assert not (workdir / "checkpoints").exists()
    # A copy of the bucket is a folder of checkpoints like any other.
    bucket.copy_to("run", workdir / "checkpoints")
    assert_same_run(workdir, tiny_run)
    shutil.rmtree(workdir / "checkpoints")

    # A damaged newest checkpoint: sampling takes the one before, training makes it anew.
    manifest = "run/40/state/manifest.ocdbt"
    bucket.write(manifest, bucket.read(manifest)[:10])
    prompt = ("--mode=sample", f"--workdir={workdir}", "--prompt=red heart", "--num_images=1")
    status, output = run(*prompt, env=bucket.env)
    assert status == 0, output
    assert "checkpoint gs://bucket/run/40 cannot be read" in output
    status, output = run(*flags, env=bucket.env)
    assert status == 0, output
    assert "goes on from step 35" in output
    assert bucket.steps("run") == ({35, 40}, {35, 40})
    assert "run/40.damaged/commit_success.txt" in bucket.names("run/")
    bucket.copy_to("run", workdir / "checkpoints")
    assert_same_run(workdir, tiny_run)


def test_a_bucket_that_is_not_there_is_one_line(run, bucket, tmp_path):
    flags = ("--config=configs/tiny.py", f"--workdir={tmp_path}/run")
    status, output = run(*flags, "--config.training.checkpoints=gs://other/run", env=bucket.env)
    assert status == 1
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "config.training.checkpoints=gs://other/run cannot be written" in line
    assert not (tmp_path / "run" / "autoencoder").exists()


def test_other_stores_are_refused():
    with pytest.raises(UserError, match="s3://bucket/run: checkpoints go to a folder or to gs://"):
        checkpoint.load("s3://bucket/run", {})


def test_a_missing_gcsfs_is_named(monkeypatch):
    monkeypatch.setattr(checkpoint.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs gcsfs: pip install"):
        checkpoint.load("gs://bucket/run", {})
