import errno
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from vqd_jax.data import sets

ROOT = pathlib.Path(__file__).parents[3]
LOAD = """
import sys
from vqd_jax.data import batches, sets
builder = sets.load('emoji_text', sys.argv[1])
source = batches.records(builder, 'train')
print(len(source), source[7]['image'].shape, 'tensorflow' in sys.modules)
"""


def start(data_dir):
    command = [sys.executable, "-c", LOAD, str(data_dir)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def test_remains_of_a_kill_are_cleared_and_two_processes_prepare_at_once(tmp_path):
    home = tmp_path / "emoji_text"
    killed = start(tmp_path)
    deadline = time.monotonic() + 60
    while not list(home.glob("incomplete.*/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert list(home.glob("incomplete.*"))
    assert not (home / "1.0.0").exists()

    for process in [start(tmp_path), start(tmp_path)]:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out == "3155 (64, 64, 3) False\n"
        assert "examples/s" not in err
    assert (home / "1.0.0" / "dataset_info.json").exists()
    assert not list(home.glob("incomplete.*"))


def test_result_of_another_process_is_used(tmp_path, monkeypatch):
    prepare = sets._prepare

    def lose_the_race(builder):
        prepare(builder)
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(sets, "_prepare", lose_the_race)
    builder = sets.load("emoji_text", str(tmp_path))
    assert builder.info.splits["test"].num_examples == 193


def test_prepared_data_is_reused(emoji, data_dir, monkeypatch):
    monkeypatch.setattr(sets, "_prepare", lambda builder: pytest.fail("prepared again"))
    assert sets.load("emoji_text", data_dir).data_path == emoji.data_path


def test_unwritable_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="cannot prepare emoji_text") as error:
        sets.load("emoji_text", str(tmp_path / "file"))
    assert str(tmp_path / "file") in str(error.value)
    assert "choose another data_dir" in str(error.value)


def test_denied_permission_is_named(tmp_path, monkeypatch):
    def denied(builder):
        raise PermissionError(errno.EACCES, "Permission denied", "somewhere")

    monkeypatch.setattr(sets, "_prepare", denied)
    with pytest.raises(PermissionError, match="Permission denied; make the directory writable"):
        sets.load("emoji_text", str(tmp_path))


def test_foreign_directory_is_an_error(tmp_path):
    (tmp_path / "emoji_text" / "1.0.0").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no prepared data set"):
        sets.load("emoji_text", str(tmp_path))


@pytest.mark.parametrize("name", ["coco", "emoji_text/32px", "shapes_text/99px", ""])
def test_unknown_name_lists_the_names(name):
    with pytest.raises(ValueError, match="emoji_text, .*, shapes_text/64px"):
        sets.load(name)


def test_default_directory_is_that_of_tfds(tmp_path):
    code = "from vqd_jax.data import sets\nprint(sets._create('emoji_text', '').data_path)"
    environment = {"TFDS_DATA_DIR": str(tmp_path), "PATH": ""}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert out.stdout.strip() == str(tmp_path / "emoji_text" / "1.0.0"), out.stderr
