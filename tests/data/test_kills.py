"""Processes that prepare, encode and train, killed at random moments: records are counted."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from vqd_jax.checkpoint import load
from vqd_jax.data import batches, codes, sets

HERE = Path(__file__).parent
RECORDS, BATCH, STEPS = 3155, 45, 211  # Just over three epochs.
KILLS = pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def start(environment):
    def start(task, folder, *arguments):
        return subprocess.Popen(
            [sys.executable, str(HERE / "killed.py"), task, str(folder), *map(str, arguments)],
            cwd=HERE.parents[1],
            env=environment | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *sys.path])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def kill_at_random(start, progress, kills, seed, *arguments, delay):
    """Kills so many processes, each after it got somewhere and up to ``delay`` seconds later.

    ``progress`` counts what a process has done so far.
    """
    moments = random.Random(seed)
    for _ in range(kills):
        process, before = start(*arguments), progress()
        while progress() <= before and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, delay))
        assert process.poll() is None, f"it ended by itself: {process.communicate()[0]}"
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(*arguments))


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    """A folder in which data was prepared and encoded without interruption."""
    folder = tmp_path_factory.mktemp("reference")
    for task in ("prepare", "encode"):
        finish(start(task, folder))
    return folder


def prepared(folder):
    """(file, captions, hash of the image) of every record, by split."""
    builder = sets.load("emoji_text", f"{folder}/data")
    return {
        split: [
            (r["file"], tuple(r["captions"]), hashlib.sha256(r["image"]).hexdigest())
            for r in batches.records(builder, split, decode=False)
        ]
        for split in builder.info.splits
    }


@pytest.mark.slow
@KILLS
def test_killed_while_preparing(start, reference, tmp_path, kills):
    # What a killed process left is removed by the next: count all that ever were.
    seen = set()

    def progress():
        seen.update((p.name, p.stat().st_ino) for p in tmp_path.rglob("*incomplete*") if p.exists())
        return len(seen)

    kill_at_random(start, progress, kills, 1, "prepare", tmp_path, delay=0.3)
    wanted, found = prepared(reference), prepared(tmp_path)
    assert len(wanted["train"]) == RECORDS
    assert found == wanted


@KILLS
def test_killed_while_encoding(start, reference, tmp_path, kills):
    (tmp_path / "data").symlink_to(reference / "data")
    shards = tmp_path / "codes" / "train"

    def progress():
        return len(list(shards.glob("codes-*.array_record")))

    kill_at_random(start, progress, kills, 2, "encode", tmp_path, delay=0.2)
    wanted = {p.name: p.read_bytes() for p in (reference / "codes" / "train").iterdir()}
    found = {p.name: p.read_bytes() for p in shards.iterdir()}
    assert found == wanted
    ids = [record.id for record in codes.open_split(str(shards))]
    assert ids == list(range(RECORDS))


@pytest.mark.slow
@KILLS
def test_killed_while_training(start, reference, tmp_path, kills):
    if not (reference / "run").exists():
        finish(start("train", reference, STEPS))
    (tmp_path / "data").symlink_to(reference / "data")
    (tmp_path / "codes").symlink_to(reference / "codes")
    metrics = tmp_path / "run" / "metrics.jsonl"

    def progress():
        return metrics.read_text().count("\n") if metrics.exists() else 0

    kill_at_random(start, progress, kills, 3, "train", tmp_path, STEPS, delay=0.1)
    states = []
    for folder in (reference, tmp_path):
        abstract = {
            "step": jax.ShapeDtypeStruct((), np.int32),
            "counts": jax.ShapeDtypeStruct((RECORDS,), np.int32),
            "order": jax.ShapeDtypeStruct((), np.uint32),
            "content": jax.ShapeDtypeStruct((), np.uint32),
        }
        step, state = load(f"{folder}/run/checkpoints", abstract)
        assert step == STEPS
        states.append(state)
    counts = np.asarray(states[1]["counts"])
    assert counts.sum() == STEPS * BATCH
    # Three whole epochs, and the beginning of a fourth.
    assert np.bincount(counts).tolist() == [
        0,
        0,
        0,
        4 * RECORDS - STEPS * BATCH,
        STEPS * BATCH - 3 * RECORDS,
    ]
    for name in states[0]:
        np.testing.assert_array_equal(states[0][name], states[1][name], err_msg=name)
