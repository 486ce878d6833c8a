import json

import pytest
from tensorboardX.proto.event_pb2 import Event

from vqd_jax.training.metrics import MetricWriter


def events(directory):
    """Events of all files, in the TFRecord format: length, checksum, bytes, checksum."""
    found = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_both_files_have_the_numbers(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.write(1, {"train/loss": 2.5})
    writer.write(2, {"train/loss": 1.5, "train/accuracy": 0.25})
    writer.close()
    assert rows(tmp_path) == [
        {"step": 1, "train/loss": 2.5},
        {"step": 2, "train/loss": 1.5, "train/accuracy": 0.25},
    ]
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in events(tmp_path / "tensorboard")
        for value in event.summary.value
    ]
    assert scalars == [
        (1, "train/loss", 2.5),
        (2, "train/loss", 1.5),
        (2, "train/accuracy", 0.25),
    ]


def test_a_continued_run_drops_what_it_does_again(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    for step in range(1, 6):
        writer.write(step, {"train/loss": step})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "train/lo')
    MetricWriter(tmp_path, 3).close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("step", [0, 7])
def test_tensorboard_is_told_to_forget_later_steps(tmp_path, step):
    MetricWriter(tmp_path, step).close()
    started = [e for e in events(tmp_path / "tensorboard") if e.HasField("session_log")]
    assert [e.step for e in started] == [step + 1]
