"""Twenty restarts of a run that is told to stop at random steps: nothing is lost or doubled.

python -m pytest -m slow tests/test_restarts.py
"""

import json
import random
import shutil
import signal
import socket
import time

import pytest

NUM_RESTARTS = 20
EVERY = {"log_every": 1, "eval_every": 25, "save_every": 7}


def rows(workdir):
    """The lines of metrics.jsonl; the last one may be half written."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def newest(workdir):
    return max((row["step"] for row in rows(workdir)), default=0)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def begin(start, workdir, count, num_steps):
    fields = {"training.num_steps": num_steps, "training.warmup_steps": 1, "sampling.num_steps": 2}
    fields |= {f"training.{name}": value for name, value in EVERY.items()}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    flags = ["--config=configs/tiny.py", f"--workdir={workdir}", *flags]
    if count == 1:
        return [start(*flags)]
    address = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": str(count),
    }
    return [
        start("--distributed", *flags, env=address | {"JAX_PROCESS_ID": str(index)})
        for index in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_twenty_restarts_at_random_steps(start, tiny_run, tmp_path, count):
    workdir = tmp_path / "run"
    workdir.mkdir()
    for folder in ("autoencoder", "codes"):
        shutil.copytree(tiny_run / folder, workdir / folder)
    rng = random.Random(count)
    stops = []
    for _ in range(NUM_RESTARTS):
        before = newest(workdir)
        both = begin(start, workdir, count, 100_000)
        deadline = time.monotonic() + 300
        while newest(workdir) == before and time.monotonic() < deadline:
            assert all(process.poll() is None for process in both), both[0].communicate()[0]
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.5))
        rng.choice(both).send_signal(signal.SIGTERM)
        for process in both:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 143, output
        stops.append(newest(workdir))
        assert stops[-1] > before
    last = stops[-1] + 3
    for process in begin(start, workdir, count, last):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    found = rows(workdir)
    assert [row["step"] for row in found if "train/loss" in row] == list(range(1, last + 1))
    evaluated = [row["step"] for row in found if "validation/bits_per_token" in row]
    due = [*range(EVERY["eval_every"], last, EVERY["eval_every"]), last]
    assert sorted(evaluated) == due
    assert not (workdir / "metrics.replaced.jsonl").exists()
    assert len(set(stops)) == NUM_RESTARTS
