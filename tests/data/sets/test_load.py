import errno
import os
import pathlib
import subprocess
import sys
import time

import pytest

from vqd_jax.data import sets
from vqd_jax.data.sets import prepare
from vqd_jax.options import DATA_SETS

ROOT = pathlib.Path(__file__).parents[3]
LOAD = """
import sys
from vqd_jax.data import batches, sets
print('ready', flush=True)
sys.stdin.readline()
builder = sets.load('ffhq_images', sys.argv[1], sys.argv[2])
source = batches.records(builder, 'train')
print(len(source), source[0]['image'].shape, 'tensorflow' in sys.modules)
"""


@pytest.fixture
def start(layout, prepared):
    """start() -> a process that loads the set when it is told to."""
    processes = []
    command = [sys.executable, "-c", LOAD, str(layout("ffhq")), prepared]

    def start():
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def go(process):
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()


def wait_for(found):
    deadline = time.monotonic() + 60
    while not found() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found()


def test_remains_of_a_kill_are_cleared_and_two_processes_prepare_at_once(start, tmp_path):
    home = tmp_path / "prepared/ffhq_images"
    picture = tmp_path / "source/ffhq/images256x256/00000.png"
    data = picture.read_bytes()
    # Whoever reads the picture waits until the test writes it.
    picture.unlink()
    os.mkfifo(picture)
    killed, *both = (start() for _ in range(3))
    go(killed)
    wait_for(lambda: list(home.glob("incomplete.*")))
    [remains] = home.glob("incomplete.*")
    for process in both:
        go(process)
    killed.kill()
    killed.communicate()
    # Another process goes on, from nothing.
    wait_for(lambda: not remains.exists() and list(home.glob("incomplete.*")))
    assert not (home / "1.0.0").exists()
    # If both prepared, one of them would now wait for ever.
    picture.write_bytes(data)
    for process in both:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out == "1 (256, 256, 3) False\n"
        assert "examples/s" not in err
    assert (home / "1.0.0" / "dataset_info.json").exists()
    assert not list(home.glob("incomplete.*"))


def test_result_of_another_process_is_used(layout, prepared, monkeypatch):
    whole = prepare._prepare

    def lose_the_race(builder, beam):
        whole(builder)
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(prepare, "_prepare", lose_the_race)
    builder = sets.load("coco_text", str(layout("coco")), prepared)
    assert builder.info.splits["validation"].num_examples == 8


def test_prepared_data_is_reused(emoji, data_dir, monkeypatch):
    monkeypatch.setattr(prepare, "_prepare", lambda builder: pytest.fail("prepared again"))
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

    monkeypatch.setattr(prepare, "_prepare", denied)
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


def test_default_directory_is_that_of_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(prepare, "_prepare", lambda builder: builder.data_path.mkdir(parents=True))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/emoji_text/1.0.0 exists but"):
        sets.load("emoji_text")


def test_every_name_has_a_builder_and_every_builder_is_named():
    found = set()
    for name in DATA_SETS:
        cls = sets.builder_class(name)
        base = name.partition("/")[0]
        assert cls.name == base
        found |= {base, *(f"{base}/{config}" for config in cls.builder_configs)}
    assert found == set(DATA_SETS)


def test_tfds_is_imported_when_a_set_is_loaded():
    code = "import sys, vqd_jax.data.sets; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"tensorflow_datasets", "grain", "apache_beam"} & set(found.split())
