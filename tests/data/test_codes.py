import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from vqd_jax.data import codes
from vqd_jax.data.shard_writer import Content
from vqd_jax.data.text import ClipTokenizer
from vqd_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


def test_a_record_is_read_as_it_was_written():
    rng = np.random.default_rng(0)
    record = codes.CachedRecord(
        2**40 + 3,
        999,
        rng.integers(0, 2**16, (2, 6)).astype(np.uint16),
        rng.integers(0, 49408, (3, 8)).astype(np.uint16),
        rng.normal(size=(3, 8, 5)).astype(np.float16),
    )
    layout = codes.CodesSource.__new__(codes.CodesSource)
    layout.num_crops, layout.num_tokens, layout.context_length, layout.feature_width = 2, 6, 8, 5
    again = layout._parse(record.to_bytes())
    assert again[:2] == record[:2]
    for ours, theirs in zip(again[2:], record[2:], strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_records_are_read_at_random_in_the_order_asked_for(cached):
    assert len(cached) == 50
    assert len(cached.manifest["shards"]) == 4
    rows = np.random.default_rng(0).integers(0, 50, 200)
    found = cached.read(rows)
    assert [r.id for r in found] == rows.tolist()
    assert [int(r.codes[0, 0]) for r in found] == rows.tolist()
    tokenizer = ClipTokenizer(8)
    for row, record in zip(rows, found, strict=True):
        wanted = tokenizer.encode_batch([f"{row} {i}" for i in range(1 + row % 3)])
        np.testing.assert_array_equal(record.text_ids, wanted)
    assert [len(r.text_ids) for r in cached] == [1 + r % 3 for r in range(50)]


@pytest.fixture
def copy(cached, tmp_path):
    return shutil.copytree(cached.folder, tmp_path / "codes")


def test_a_cache_of_another_autoencoder_is_refused(copy):
    with pytest.raises(UserError, match="by another autoencoder .autoencoder is first, not other"):
        codes.open_split(str(copy), {"autoencoder": "other"})
    with pytest.raises(UserError, match="image_size is 8, not 16"):
        codes.open_split(str(copy), {"autoencoder": "first", "image_size": 16})
    assert len(codes.open_split(str(copy), {"autoencoder": "first", "image_size": 8})) == 50


def test_a_cache_that_is_not_there_or_not_finished_is_named(copy, tmp_path):
    with pytest.raises(UserError, match="none has no cached codes"):
        codes.open_split(str(tmp_path / "none"))
    (copy / codes.MANIFEST).unlink()
    with pytest.raises(UserError, match="codes is not finished .no manifest.json."):
        codes.open_split(str(copy))


@pytest.mark.parametrize("kept", [0, 1000, -10])
def test_a_shard_cut_short_is_named(copy, kept):
    path = copy / "codes-00002-of-00004.array_record"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="00002-of-00004.array_record is missing or damaged"):
        codes.open_split(str(copy))


def test_a_shard_of_the_right_size_with_other_bytes_is_named(copy):
    path = copy / "codes-00002-of-00004.array_record"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match="00002-of-00004.array_record is damaged"):
        codes.open_split(str(copy)).read(np.arange(50))


def test_an_error_of_the_system_is_not_called_damage(copy, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    source = codes.open_split(str(copy))
    before = [record.to_bytes() for record in source.read(np.arange(50))]
    links = {int(number): f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")}
    broken = os.open(os.devnull, os.O_WRONLY)
    for number, link in links.items():
        if os.path.exists(link) and os.readlink(link).startswith(str(copy)):
            os.dup2(broken, number)
    # As after "Stale file handle": the shards are opened again.
    assert [record.to_bytes() for record in source.read(np.arange(50))] == before
    os.close(broken)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_manifest_is_named(copy, text):
    (copy / codes.MANIFEST).write_text(text)
    with pytest.raises(UserError, match="manifest.json.*encode again"):
        codes.open_split(str(copy))


def test_another_format_is_refused(copy):
    manifest = json.loads((copy / codes.MANIFEST).read_text()) | {"format": 2}
    (copy / codes.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has format 2, this program reads 1"):
        codes.open_split(str(copy))


def test_labels_and_nothing(make_cache, tmp_path):
    labelled = codes.open_split(str(make_cache(tmp_path / "a", 9, content=Content(num_classes=5))))
    assert [r.label for r in labelled] == [r % 5 for r in range(9)]
    assert labelled.num_classes == 5
    bare = codes.open_split(str(make_cache(tmp_path / "b", 9, content=Content())))
    assert [r.text_ids.shape for r in bare] == [(0, 0)] * 9


MANY = """
import resource, sys
from pathlib import Path
import numpy as np
from vqd_jax.data import codes
source = codes.open_split(sys.argv[1])
rows = np.random.default_rng(0).permutation(len(source))
found = source.read(rows)
assert [record.id for record in found] == rows.tolist()
print(len(source.manifest["shards"]), len(source), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def many_shards(make_cache, folder, count, limit):
    make_cache(folder, count, records_per_shard=1, batch_size=1)
    command = f"ulimit -n {limit} && exec {sys.executable} -c '{MANY}' {folder}"
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)


def test_more_shards_than_files_may_be_open(make_cache, tmp_path):
    done = many_shards(make_cache, tmp_path, 200, 64)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["200", "200", "64"]


@pytest.mark.slow
def test_a_thousand_shards_at_256_files(make_cache, tmp_path):
    done = many_shards(make_cache, tmp_path, 1000, 256)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1000", "1000", "256"]
