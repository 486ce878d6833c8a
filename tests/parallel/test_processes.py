"""Real processes on virtual CPU devices: the same run on any mesh, and an end when one ends."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import tiny
from vqd_jax.parallel import processes

WORKER = Path(__file__).with_name("worker.py")
ROOT = WORKER.parents[2]
RUN = {"training.num_steps": 20, "training.log_every": 1, "training.save_every": 10}
ALL_AXES = {"mesh.fsdp": 2, "mesh.tensor": 2}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def launch(environment):
    """launch(processes, devices of each, workdir, options) -> the processes."""

    def launch(count, devices, workdir, **options):
        options["config"] = RUN | options.get("config", {})
        env = environment | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
        if count > 1:
            address = f"127.0.0.1:{free_port()}"
            env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        return [
            subprocess.Popen(
                [sys.executable, WORKER, str(devices), str(workdir), json.dumps(options)],
                env=env | {"JAX_PROCESS_ID": str(index)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for index in range(count)
        ]

    return launch


@pytest.fixture(scope="module")
def run(launch):
    """run(...) -> outputs of processes that all ended well."""

    def run(*args, **options):
        started = launch(*args, **options)
        outputs = [process.communicate(timeout=600)[0] for process in started]
        for process, output in zip(started, outputs, strict=True):
            assert process.returncode == 0, output
        return outputs

    return run


def losses(workdir, name="train/loss"):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if name in row]
    assert [row["step"] for row in rows] == list(range(1, 21))
    return [row[name] for row in rows]


def codes(workdir):
    return json.loads((workdir / "codes.json").read_text())


def assert_same(workdir, reference):
    assert losses(workdir) == pytest.approx(losses(reference), rel=1e-5)
    assert codes(workdir) == codes(reference)


def from_step_10(workdir, target):
    """A copy of the workdir as it was when step 10 was saved."""
    shutil.copytree(workdir, target)
    shutil.rmtree(target / "checkpoints" / "20")
    (target / "codes.json").unlink()
    return target


@pytest.fixture(scope="module")
def one(run, tmp_path_factory):
    """A run on one device."""
    workdir = tmp_path_factory.mktemp("one")
    run(1, 1, workdir)
    assert len({tuple(image) for image in codes(workdir)}) == 16
    return workdir


@pytest.fixture(scope="module")
def eight(run, tmp_path_factory):
    """A run on eight devices of one process, on all three axes."""
    workdir = tmp_path_factory.mktemp("eight")
    run(1, 8, workdir, config=ALL_AXES)
    return workdir


@pytest.fixture(scope="module")
def two(run, tmp_path_factory):
    """A run of two processes with four devices each."""
    workdir = tmp_path_factory.mktemp("two")
    run(2, 4, workdir, config=ALL_AXES)
    return workdir


@pytest.mark.slow
def test_eight_devices_make_the_same_run_as_one(one, eight):
    assert_same(eight, one)


def test_two_processes_read_one_cache_and_make_the_same_run_as_one(run, tiny_run, tmp_path):
    # Two devices of each process, and every axis of the mesh goes over both processes.
    def logged(workdir):
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}

    config = tiny.get_config().training
    same = {f"training.{name}": config[name] for name in ("num_steps", "log_every", "save_every")}
    outputs = run(2, 2, tmp_path, config=same | ALL_AXES, codes=str(tiny_run / "codes" / "train"))
    # One of them shows the progress.
    assert ["training: 100%" in output for output in outputs] == [True, False]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    expected = logged(tiny_run)
    assert len(expected) > 3
    assert logged(tmp_path) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_two_processes_make_the_same_run_as_one(one, two):
    assert_same(two, one)


@pytest.mark.slow
def test_a_run_goes_on_from_eight_devices_on_four(run, one, eight, tmp_path):
    workdir = from_step_10(eight, tmp_path / "run")
    run(1, 4, workdir, config={"mesh.fsdp": 4})
    assert_same(workdir, one)


@pytest.mark.slow
def test_a_run_goes_on_from_two_processes_on_one(run, one, two, tmp_path):
    workdir = from_step_10(two, tmp_path / "alone")
    run(1, 1, workdir)
    assert_same(workdir, one)


@pytest.mark.slow
def test_a_run_goes_on_from_one_process_on_two_past_a_damaged_checkpoint(run, one, tmp_path):
    workdir = tmp_path / "together"
    shutil.copytree(one, workdir)
    for path in (workdir / "checkpoints" / "20" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    (workdir / "codes.json").unlink()
    run(2, 1, workdir)
    assert_same(workdir, one)
    names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert names == ["10", "20", "20.damaged"]


@pytest.mark.slow
def test_two_processes_save_to_a_bucket_and_one_goes_on(run, one, bucket, tmp_path):
    place = {"training.checkpoints": "gs://bucket/two"}
    run(2, 4, tmp_path, config=place | ALL_AXES, env=bucket.env)
    assert bucket.steps("two") == ({10, 20}, {10, 20})
    bucket.remove("two/20/")
    (output,) = run(1, 1, tmp_path, config=place, env=bucket.env)
    assert "| 10/20 [00:00<" in output
    assert_same(tmp_path, one)


def outputs_within(started, seconds):
    start = time.monotonic()
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in started]
    except subprocess.TimeoutExpired:
        for process in started:
            process.kill()
        raise
    return outputs, time.monotonic() - start


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_is_named(launch, tmp_path):
    started = launch(2, 1, tmp_path, kill_at=5)
    started[1].wait(timeout=300)
    assert started[1].returncode == -signal.SIGKILL
    (output,), _ = outputs_within(started[:1], 60)
    assert started[0].returncode != 0
    # The words are JAX's.
    assert "tasks are unhealthy (stopped sending heartbeats):\n1" in output


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_others_and_is_told(launch, tmp_path):
    started = launch(2, 1, tmp_path, fail_at=5)
    started[1].wait(timeout=300)
    (output, failed), _ = outputs_within(started, 60)
    assert "ValueError: a broken record" in failed
    assert "because process 1 failed (ValueError: a broken record)" in output
    assert [process.returncode for process in started] == [1, 1]


def test_a_jax_that_hides_its_key_value_store_is_told(monkeypatch, caplog):
    jax.devices()  # JAX itself needs the name to begin.
    monkeypatch.delattr("jax._src.distributed.global_state")
    with caplog.at_level("WARNING"):
        watch = processes._Watch()
        watch.stop()
    assert "has no key-value store" in caplog.text
    left = []
    monkeypatch.setattr(processes.atexit, "register", lambda *args: left.append(args))
    monkeypatch.setattr(processes, "_POLL_SECONDS", 0)
    processes._fail_together(ValueError("a broken record"))
    # It still does not wait for the others, whom its missing heartbeat ends.
    assert left == [(processes._leave, None)]


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_ends_all(launch, run, one, two, tmp_path):
    # Its number of calls is not that of its steps, and Orbax has told the service those of saves.
    workdir = from_step_10(two, tmp_path / "run")
    options = {"config": {"training.save_every": 2}}
    started = launch(2, 1, workdir, signal_at=17, **options)
    (first, second), _ = outputs_within(started, 300)
    assert [process.returncode for process in started] == [143, 143], first + second
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    # The signal comes as batch 17 is read, and batches are read up to two steps ahead.
    assert 14 <= saved < 20
    for output in (first, second):
        assert f"stopped by SIGTERM at step {saved}" in output
    run(2, 1, workdir)
    assert_same(workdir, one)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_two_processes_begin_from_weights_as_one_does(run, one, tiny_run, tmp_path, rank):
    config = {"training.init_from": str(tiny_run), "training.adapter_rank": rank}
    run(1, 1, tmp_path / "one", config=config)
    run(2, 4, tmp_path / "two", config=config | ALL_AXES)
    assert_same(tmp_path / "two", tmp_path / "one")
    # It did not begin from random weights.
    assert losses(tmp_path / "one")[0] != pytest.approx(losses(one)[0], rel=1e-3)
    alone = from_step_10(tmp_path / "two", tmp_path / "alone")
    run(1, 1, alone, config=config)
    assert_same(alone, tmp_path / "one")


@pytest.mark.slow
def test_muon_makes_the_same_run_on_two_processes_as_on_one(run, one, tmp_path):
    config = {"training.optimizer": "muon"}
    run(1, 1, tmp_path / "one", config=config)
    run(2, 4, tmp_path / "two", config=config | ALL_AXES)
    # Muon brings small singular values to 1, and makes rounding errors as large.
    pairs = losses(tmp_path / "two"), losses(tmp_path / "one"), losses(one)
    np.testing.assert_allclose(pairs[0], pairs[1], rtol=1e-3)
    assert np.abs(np.subtract(pairs[2], pairs[1])).max() > 0.01
    alone = from_step_10(tmp_path / "two", tmp_path / "alone")
    run(1, 1, alone, config=config)
    np.testing.assert_allclose(losses(alone), pairs[0], rtol=1e-3)


# Stage one with both networks, from the command line.
JUDGED = {
    "adversarial_weight": 0.2, "lecam_weight": 0.1, "ema_decay": 0.9, "learning_rate": 2e-4,
    "discriminator_channels": 8, "discriminator_layers": 1,
}  # fmt: skip


@pytest.fixture
def train_tokenizer(start):
    """train_tokenizer(processes, devices of each, workdir, flags) -> their outputs."""

    def train_tokenizer(count, devices, workdir, *flags):
        fields = {f"autoencoder.{name}": value for name, value in JUDGED.items()}
        named = ("--config=configs/tiny.py", "--mode=train_autoencoder", f"--workdir={workdir}")
        changed = (f"--config.{name}={value}" for name, value in (RUN | fields).items())
        flags = (*named, *changed, *flags)
        env = {}
        if count > 1:
            flags += ("--distributed",)
            address = f"127.0.0.1:{free_port()}"
            env = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        started = [
            start(*flags, devices=devices, env=env | {"JAX_PROCESS_ID": str(index)})
            for index in range(count)
        ]
        outputs = [process.communicate(timeout=600)[0] for process in started]
        assert [process.returncode for process in started] == [0] * count, "\n".join(outputs)
        return outputs

    return train_tokenizer


@pytest.mark.slow
def test_two_processes_train_a_tokenizer_with_a_discriminator(train_tokenizer, tmp_path):
    one, two, alone = (tmp_path / name for name in ("one", "two", "alone"))
    train_tokenizer(1, 1, one)
    train_tokenizer(2, 2, two, "--config.mesh.fsdp=2")
    shutil.copytree(two, alone)
    for name in ("checkpoints/20", "model"):
        shutil.rmtree(alone / "autoencoder" / name)
    (output,) = train_tokenizer(1, 1, alone)
    assert "autoencoder goes on from step 10" in output
    for name in ("autoencoder/loss", "autoencoder/discriminator_loss"):
        expected = losses(one / "autoencoder", name)
        assert np.ptp(expected) > 0.01
        for workdir in (two, alone):
            found = losses(workdir / "autoencoder", name)
            np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=f"{name} {workdir}")


@pytest.mark.slow
def test_several_steps_a_call_and_a_trace(run, one, tmp_path):
    options = {"training.steps_per_call": 5, "training.profile_steps": 5}
    run(1, 2, tmp_path, config=options | {"training.log_every": 5})
    rows = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    found = {row["step"]: row["train/loss"] for row in rows}
    expected = dict(enumerate(losses(one), start=1))
    assert found == pytest.approx({step: expected[step] for step in (5, 10, 15, 20)}, rel=1e-5)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "20"]
    assert os.path.getsize(next((tmp_path / "profile").rglob("*.xplane.pb"))) > 1000
