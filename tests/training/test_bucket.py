"""Checkpoints in a bucket, which is served on this machine; real processes, really killed."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from tests.test_reliability import assert_same_run
from vqd_jax.errors import UserError
from vqd_jax.training import checkpoint

SERVER = Path(__file__).with_name("bucket_server.py")


class Bucket:
    """What is in the bucket, seen past the run."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"

    def names(self, prefix):
        query = urllib.parse.urlencode({"prefix": prefix})
        with urllib.request.urlopen(f"{self.url}/storage/v1/b/bucket/o?{query}") as answer:
            return [item["name"] for item in json.load(answer)["items"]]

    def steps(self, run):
        """Steps with a file, and those of them that are complete."""
        parts = [name.split("/") for name in self.names(run + "/")]
        begun = {int(part[1]) for part in parts if part[1].isdigit()}
        return begun, {s for s in begun if [run, str(s), "commit_success.txt"] in parts}

    def read(self, name):
        return urllib.request.urlopen(f"{self.url}/bucket/{urllib.parse.quote(name)}").read()

    def write(self, name, content):
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        url = f"{self.url}/upload/storage/v1/b/bucket/o?{query}"
        urllib.request.urlopen(urllib.request.Request(url, data=content)).close()

    def copy_to(self, run, folder):
        for name in self.names(run + "/"):
            target = folder / name.removeprefix(run + "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.read(name))


@pytest.fixture(scope="module")
def bucket():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, SERVER, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    bucket = Bucket(port)
    for _ in range(600):
        assert process.poll() is None
        try:
            bucket.names("")
            break
        except urllib.error.URLError:
            time.sleep(0.1)
    yield bucket
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def env(bucket):
    """For Google's libraries to take the bucket for theirs."""
    return {
        "STORAGE_EMULATOR_HOST": bucket.url,
        "TENSORSTORE_GCS_HTTP_URL": bucket.url,
        # Another service, which tells the kind of a bucket, is not there.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


def test_a_run_killed_while_it_saves_to_a_bucket_goes_on(
    start, run, tiny_run, bucket, env, tmp_path
):
    workdir = tmp_path / "run"
    flags = ("--config=configs/tiny.py", f"--workdir={workdir}")
    flags = (*flags, "--config.training.checkpoints=gs://bucket/run")
    # What is left when the first save is cut off.
    bucket.write("run/5/state/manifest.ocdbt", b"cut off")
    begun, complete = bucket.steps("run")
    while begun == complete or not complete:  # Again, if it was faster than the signal.
        process = start(*flags, env=env)
        while not (seen := bucket.steps("run"))[1] or seen[0] == seen[1]:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        begun, complete = bucket.steps("run")

    status, output = run(*flags, env=env)
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
    status, output = run(*prompt, env=env)
    assert status == 0, output
    assert "checkpoint gs://bucket/run/40 cannot be read" in output
    status, output = run(*flags, env=env)
    assert status == 0, output
    assert "goes on from step 35" in output
    assert bucket.steps("run") == ({35, 40}, {35, 40})
    assert "run/40.damaged/commit_success.txt" in bucket.names("run/")
    bucket.copy_to("run", workdir / "checkpoints")
    assert_same_run(workdir, tiny_run)


def test_a_bucket_that_is_not_there_is_one_line(run, env, tmp_path):
    flags = ("--config=configs/tiny.py", f"--workdir={tmp_path}/run")
    status, output = run(*flags, "--config.training.checkpoints=gs://other/run", env=env)
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
