"""Files that appear whole, locks, reads that are tried again, and fingerprints."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from vqd_jax import files
from vqd_jax.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path):
    target = tmp_path / "new" / "grid.png"
    with files.appearing(target) as scratch:
        # Pillow and numpy choose the format by the suffix.
        assert scratch.suffix == ".png" and scratch.parent == target.parent
        scratch.write_bytes(b"half")
        assert not target.exists()
        scratch.write_bytes(b"whole")
    assert target.read_bytes() == b"whole" and names(target.parent) == ["grid.png"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_leaves_what_was_there(tmp_path, kind):
    target = tmp_path / "model"

    def write(place, text):
        if kind == "folder":
            place.mkdir()
            place = place / "weights"
        place.write_text(text)

    write(target, "old")
    with pytest.raises(RuntimeError, match="midway"), files.appearing(target) as scratch:
        write(scratch, "new")
        raise RuntimeError("midway")
    assert names(tmp_path) == ["model"]
    assert (target / "weights" if kind == "folder" else target).read_text() == "old"


def test_a_folder_replaces_a_folder(tmp_path):
    target = tmp_path / "model"
    for text in ("old", "new"):
        with files.appearing(target) as scratch:
            scratch.mkdir()
            (scratch / text).write_text(text)
    assert names(tmp_path) == ["model"] and names(target) == ["new"]


def test_relative_targets_and_dots(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.write_text("a.txt", "a")
    files.write_text("./b/../c.txt", "c")
    assert names(tmp_path) == ["a.txt", "c.txt"]


WRITER = """
import pathlib, sys, time
from vqd_jax import files
with files.appearing(sys.argv[1]) as scratch:
    scratch.write_text("half")
    print("written", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_the_old_file_and_its_remains_can_be_removed(tmp_path):
    target = tmp_path / "codes[1].json"
    files.write_text(target, "old")
    (tmp_path / ".tmp-12345678-other.json").write_text("somebody else's")
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout.readline() == "written\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert target.read_text() == "old" and len(names(tmp_path)) == 3
    files.remove_remains(target)
    assert names(tmp_path) == [".tmp-12345678-other.json", "codes[1].json"]


def test_json_comes_back_and_damage_is_named(tmp_path):
    path = tmp_path / "manifest.json"
    files.write_json(path, {"rows": 3, "crop": [1, 2.5, None]})
    assert files.read_json(path, "remove it") == {"rows": 3, "crop": [1, 2.5, None]}
    path.write_text('{"rows": ')
    with pytest.raises(UserError, match=r"manifest.json is damaged .*; remove it"):
        files.read_json(path, "remove it")
    path.write_text("[3]")
    with pytest.raises(UserError, match=r"does not hold a JSON object; remove it"):
        files.read_json(path, "remove it")
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="is damaged"):
        files.read_json(path, "remove it")
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "none", "remove it")


HOLDER = """
import sys, time
from vqd_jax import files
with files.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_holds_a_lock_and_death_frees_it(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another run"), files.lock(path, busy="another run"):
        pass
    holder.kill()
    holder.communicate()
    with files.lock(path, busy="another run"):
        pass


def test_a_lock_that_waits(tmp_path):
    path = tmp_path / "lock"
    script = "import sys\nfrom vqd_jax import files\nwith files.lock(sys.argv[1]): print('held')"
    with files.lock(path):
        waiting = subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
        )
        # Long enough that a lock that does not wait would be through.
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=1.5)
    assert waiting.communicate()[0] == "held\n" and waiting.returncode == 0


@pytest.mark.parametrize(
    "number, calls", [(errno.EIO, 3), (errno.ESTALE, 3), (errno.ENOENT, 1), (errno.ENOSPC, 1)]
)
def test_errors_that_may_pass_are_tried_again(number, calls):
    seen = []

    def read():
        seen.append(time.monotonic())
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError) as error:
        files.read_again(read, seconds=1e-3)
    assert error.value.errno == number and len(seen) == calls


def test_a_read_that_succeeds_late():
    answers = [OSError(errno.EIO, "a hiccup"), OSError(errno.EIO, "a hiccup"), b"bytes"]

    def read():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert files.read_again(read, seconds=1e-3) == b"bytes"


def test_other_errors_pass_at_once():
    calls = []
    with pytest.raises(ValueError):
        files.read_again(lambda: (calls.append(0), int("x")))
    assert len(calls) == 1


def test_fingerprints_see_all_that_decides():
    base = {"config": {"size": 64, "crop": "centre"}, "params": {"w": np.arange(6.0)}}
    same = {"params": {"w": np.arange(6.0)}, "config": {"crop": "centre", "size": 64}}
    assert files.fingerprint(base) == files.fingerprint(same)
    assert len(files.fingerprint(base)) == 64
    changed = [
        {**base, "config": {"size": 65, "crop": "centre"}},
        {**base, "config": {"size": "64", "crop": "centre"}},
        {**base, "config": {"size": 64, "crop": "centre", "flip": False}},
        {**base, "params": {"w": np.arange(6.0).reshape(2, 3)}},
        {**base, "params": {"w": np.arange(6.0).astype(np.float32)}},
        {**base, "params": {"v": np.arange(6.0)}},
        {**base, "params": {"w": np.nextafter(np.arange(6.0), 9)}},
    ]
    found = {files.fingerprint(value) for value in [base, *changed]}
    assert len(found) == 8
    # The order in memory is not part of a value.
    fortran = {"w": np.asfortranarray(np.arange(6.0).reshape(2, 3))}
    assert files.fingerprint(fortran) == files.fingerprint({"w": np.arange(6.0).reshape(2, 3)})


def test_flatten_and_differences():
    nested = {"a": {"b": 1, "c": {"d": [1, 2]}}, "e": None}
    old = files.flatten(nested)
    assert old == {"a.b": 1, "a.c.d": [1, 2], "e": None}
    assert files.unflatten(old, nested) == nested
    new = {**old, "a.b": 2, "f": "x"}
    assert files.differences(old, new) == ["a.b: 1 -> 2", "f: None -> 'x'"]
    assert files.differences(old, json.loads(json.dumps(old))) == []


def test_a_file_system_without_locks_is_worked_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(number):
        def flock(file, how):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)
        caplog.clear()

    for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        refuse(number)
        with files.lock(tmp_path / "lock", busy="another run is at work"):
            assert f"the file system of {tmp_path / 'lock'} has no locks" in caplog.text
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output"), files.lock(tmp_path / "lock"):
        pass


def test_advice_fits_the_cause():
    found = {n: files.advice(OSError(n, "")) for n in (errno.ENOSPC, errno.EACCES, errno.ENOSYS)}
    assert found == {
        errno.ENOSPC: "make room", errno.EACCES: "make the directory writable", errno.ENOSYS: "",
    }  # fmt: skip
    assert files.advice(RuntimeError("INTERNAL: No space left on device")) == "make room"
    assert files.advice(UnicodeEncodeError("utf-8", "\ud83c", 0, 1, "surrogates")) == ""


def test_paths_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("RUN", "seven")
    assert files.expanded("~/runs/$RUN/${RUN}") == "/home/somebody/runs/seven/seven"
    assert files.expanded("a~/gs://x/$NOT_THERE") == "a~/gs://x/$NOT_THERE"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("caf\u00e9 \u4e2d".encode("utf-16"), "caf\u00e9 \u4e2d"),
        ("caf\u00e9 one".encode("utf-16-le"), "caf\u00e9 one"),
        ("caf\u00e9 one".encode("utf-16-be"), "caf\u00e9 one"),
        ("caf\u00e9".encode("utf-32"), "caf\u00e9"),
        (b"\xef\xbb\xbfplain", "plain"),
        (b"\x93caf\xe9\x94", "\u201ccaf\u00e9\u201d"),
        (b"", ""),
    ],
)
def test_text_as_programs_write_it(data, text):
    assert files.decode_text(data, "somewhere") == text


def test_half_characters_and_names_of_other_bytes_can_be_stored():
    assert files.whole_characters("a\ud83c") == "a\ufffd"
    assert files.whole_characters("\ud83d\ude00") == "\U0001f600"
    assert files.printable("caf\udce9.png") == "caf\\udce9.png"
