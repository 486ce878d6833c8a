import errno
import os

import pytest
from array_record.python import array_record_module

from vqd_jax.data import bad_records
from vqd_jax.data.bad_records import CheckedReader
from vqd_jax.errors import UserError


def good(number):
    return {"captions": ["a dot"], "number": number}


class Source(list):
    """Records; an entry that is an exception is raised, a list of them one at each read."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        if isinstance(found, list):
            found = found.pop(0) if len(found) > 1 else found[0]
        if isinstance(found, Exception):
            raise found
        return found


def source():
    rows = Source(good(r) for r in range(20))
    rows[3] = ValueError("cut short")
    rows[7] = {"captions": []}
    rows[11] = {"captions": ["a dot", " "]}
    rows[12] = {}
    return rows


def system_error():
    return OSError(errno.EIO, "Input/output error")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_bad_records_are_counted_once():
    read = CheckedReader(source(), max_bad_share=0.2)
    for _ in range(3):
        given = [read(i) for i in range(20)]
    assert [i for i, r in enumerate(given) if r is None] == [3, 7, 11, 12] == sorted(read.bad)
    assert given[0]["captions"] == ["a dot"]


def test_readers_share_their_count_through_the_log(tmp_path):
    log = tmp_path / "bad_records.jsonl"
    first, second = (CheckedReader(source(), 0.1, str(log)) for _ in range(2))
    assert first(3) is None
    assert second(7) is None
    with pytest.raises(UserError, match="3 of 20 records are bad.*the last one is record 12"):
        first(12)
    rows = bad_records.read(log)
    assert [row["record"] for row in rows] == [3, 7, 12]
    assert all("Error" in row["reason"] for row in rows)


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    path = tmp_path / "deeper" / bad_records.FILE
    assert bad_records.read(path) == []
    bad_records.append(path, {"record": 1, "reason": "Füße"})
    whole = path.read_text()
    path.write_text(whole + whole[:9])
    assert bad_records.read(path) == [{"record": 1, "reason": "Füße"}]


@pytest.mark.parametrize("failures", [1, 2])
def test_a_transient_error_of_the_system_is_no_bad_record(tmp_path, failures):
    rows = source()
    rows[5] = [*(system_error() for _ in range(failures)), good(5)]
    read = CheckedReader(rows, 0.2, str(tmp_path / "log"))
    assert read(5)["number"] == 5
    assert read.bad == {}
    assert not (tmp_path / "log").exists()


def test_a_lasting_error_of_the_system_is_raised_as_what_it_is(tmp_path):
    rows = source()
    rows[5], rows[6] = system_error(), PermissionError(errno.EACCES, "not yours")
    read = CheckedReader(rows, 1.0, str(tmp_path / "log"))
    with pytest.raises(OSError, match="Input/output error"):
        read(5)
    with pytest.raises(PermissionError, match="not yours"):
        read(6)
    assert read.bad == {}
    assert not (tmp_path / "log").exists()


@pytest.fixture
def stored(tmp_path):
    """Reads record i of an array_record file; and the descriptor that it reads from."""
    path = str(tmp_path / "x.array_record")
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
    for i in range(20):
        writer.write(bytes([i]) * 5000)
    writer.close()
    reader = array_record_module.ArrayRecordReader(path, options="readahead_buffer_size:0")
    descriptors = {int(name): f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")}
    (descriptor,) = (
        n for n, link in descriptors.items() if os.path.exists(link) and os.readlink(link) == path
    )
    yield lambda i: reader.read([i])[0], descriptor
    reader.close()


def test_array_record_errors_of_the_system_are_told_from_damage(stored):
    read, descriptor = stored
    kept, broken = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
    os.dup2(broken, descriptor)
    with pytest.raises(OSError, match="failed: Bad file descriptor"):
        bad_records.read_stored(lambda: read(9))

    def mended():
        try:
            return read(9)
        finally:
            os.dup2(kept, descriptor)

    assert bad_records.read_stored(mended) == bytes([9]) * 5000
    damaged = os.readlink(f"/proc/self/fd/{kept}")
    with open(damaged, "r+b") as file:
        file.seek(30_000)
        file.write(bytes(30_000))
    with pytest.raises(RuntimeError, match="Corrupted"):
        bad_records.read_stored(lambda: read(7))
    for number in (kept, broken):
        os.close(number)


def test_too_many_bad_records_are_refused_with_the_counts():
    bad_records.require_share(2, 20, 0.1, "", "the last one is 3")
    with pytest.raises(UserError, match="cub: at least 3 of 20 records are bad.*0.1; see x[.]"):
        bad_records.require_share(3, 20, 0.1, "cub: at least ", "see x")
