import json
import subprocess
import sys

import numpy as np
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


def test_what_a_continued_run_does_again_is_kept_beside(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    for step in range(1, 6):
        writer.write(step, {"train/loss": step})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "train/lo')
    MetricWriter(tmp_path, 3).close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    MetricWriter(tmp_path, 0).close()
    assert rows(tmp_path) == []
    kept = (tmp_path / "metrics.replaced.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept] == [4, 5, 1, 2, 3]


def shown(directory):
    """The points of 'train/loss' that TensorBoard shows: a start purges its step and later ones."""
    points = []
    for event in sorted(events(directory), key=lambda event: event.wall_time):
        if event.HasField("session_log"):
            assert event.session_log.status == event.session_log.START
            points = [point for point in points if point[0] < event.step]
        points += [(event.step, value.simple_value) for value in event.summary.value]
    return points


def test_tensorboard_shows_no_point_twice_and_no_old_one(tmp_path):
    for begin, end in ((0, 5), (3, 7), (0, 2), (2, 3)):
        writer = MetricWriter(tmp_path, begin)
        for step in range(begin + 1, end + 1):
            writer.write(step, {"train/loss": 10 * begin + step})
        writer.close()
    assert shown(tmp_path / "tensorboard") == [(1, 1.0), (2, 2.0), (3, 23.0)]


def test_pictures_are_in_the_event_file(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.image(4, "samples", np.full((2, 3, 3), 7, np.uint8))
    writer.close()
    (value,) = [v for e in events(tmp_path / "tensorboard") for v in e.summary.value]
    assert (value.image.height, value.image.width) == (2, 3)


def test_events_do_not_bring_pytorch(tmp_path):
    program = (
        "import importlib.util, sys\n"
        "from vqd_jax.training.metrics import MetricWriter\n"
        f"writer = MetricWriter({str(tmp_path)!r}, 0)\n"
        "writer.write(1, {'loss': 2.0})\n"
        "writer.close()\n"
        "assert 'torch' not in sys.modules\n"
        "if importlib.util.find_spec('torch'):\n"
        "    import torch\n"
        "    assert torch.ones(2).sum() == 2\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert [e.step for e in events(tmp_path / "tensorboard") if e.summary.value] == [1]
