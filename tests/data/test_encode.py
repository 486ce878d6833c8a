import collections
import errno
import json
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from configs import emoji as emoji_config
from vqd_jax import files
from vqd_jax.data import bad_records, batches, codes, encode
from vqd_jax.data.batches import Crop
from vqd_jax.data.text import ClipTokenizer, TextFeatures
from vqd_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def ids(folder):
    return [record.id for record in codes.open_split(str(folder))]


def manifest_of(folder):
    return json.loads((folder / codes.MANIFEST).read_text())


def test_every_good_record_once_in_order(make_cache, tmp_path):
    make_cache(tmp_path, 40, bad=(3, 20, 39))
    assert ids(tmp_path) == [i for i in range(40) if i not in (3, 20, 39)]
    lines = (tmp_path / bad_records.FILE).read_text().splitlines()
    assert sorted(json.loads(line)["record"] for line in lines) == [3, 20, 39]
    manifest = manifest_of(tmp_path)
    assert (manifest["records"], manifest["bad_records"]) == (37, 3)


def test_the_manifest_tells_of_codebook_and_quality(make_cache, tmp_path):
    make_cache(tmp_path, 40)
    manifest = manifest_of(tmp_path)
    # Forty codes, equally often; every picture comes back as it was.
    assert manifest["codes_used"] == 40
    assert manifest["perplexity"] == pytest.approx(40)
    assert manifest["psnr"] > 100
    assert manifest["psnr_images"] == 3 * 4
    assert manifest["captions"] == sum(1 + r % 3 for r in range(40))
    remap = np.load(tmp_path / encode.REMAP)
    assert remap.tolist() == [*range(1, 41)] + [0] * 216


def test_psnr_is_that_of_the_pixels(make_cache, tmp_path):
    # A gradient comes back as its first pixel: known squared error.
    ramp = np.zeros((8, 8, 3), np.uint8)
    ramp[:] = np.arange(8, dtype=np.uint8)[:, None, None] * 10
    make_cache(tmp_path, 4, source=[{"image": ramp, "captions": ["a"]}] * 4)
    wanted = 10 * np.log10(255**2 / np.mean((np.arange(8) * 10.0) ** 2))
    assert manifest_of(tmp_path)["psnr"] == pytest.approx(wanted)


def test_running_again_changes_nothing(make_cache, tmp_path):
    before = snapshot(make_cache(tmp_path, 40))
    make_cache(tmp_path, 40)
    assert snapshot(tmp_path) == before


class StopsAt:
    """A list of records that breaks off when record ``at`` is read."""

    def __init__(self, records, at):
        self._records, self._at = records, at

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        if index == self._at:
            raise KeyboardInterrupt
        return self._records[index]


@pytest.mark.parametrize("at", [0, 15, 16, 39])
def test_an_interrupted_encoding_goes_on_with_the_first_missing_shard(make_cache, tmp_path, at):
    whole = snapshot(make_cache(tmp_path / "whole", 40, source=pictures(40)))
    with pytest.raises(KeyboardInterrupt):
        make_cache(tmp_path / "parts", 40, source=StopsAt(pictures(40), at))
    left = snapshot(tmp_path / "parts")
    assert len([name for name in left if name.endswith("array_record")]) == at // 16
    assert codes.MANIFEST not in left
    with pytest.raises(UserError, match="is not finished|no cached codes"):
        codes.open_split(str(tmp_path / "parts"))
    make_cache(tmp_path / "parts", 40, source=pictures(40))
    assert snapshot(tmp_path / "parts") == whole


def pictures(count):
    return [
        {"image": np.full((8, 8, 3), r, np.uint8), "captions": [f"number {r}"]}
        for r in range(count)
    ]


@pytest.mark.parametrize("name", ["codes-00001-of-00003.array_record", "codes-00001-of-00003.json"])
@pytest.mark.parametrize("kept", [None, 0, 100])
def test_only_a_damaged_shard_is_made_anew(make_cache, tmp_path, name, kept):
    whole = snapshot(make_cache(tmp_path, 40))
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    if kept is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(whole[name][:kept])
    make_cache(tmp_path, 40)
    assert snapshot(tmp_path) == whole
    kept_shards = [f"codes-0000{s}-of-00003.array_record" for s in (0, 2)]
    for shard in kept_shards:
        assert (tmp_path / shard).stat().st_mtime_ns == times[shard]


@pytest.mark.parametrize("count", [2, 5])
def test_processes_share_the_shards(make_cache, tmp_path, count):
    whole = snapshot(make_cache(tmp_path / "one", 70))
    for index in range(count):
        make_cache(tmp_path / "many", 70, process_index=index, process_count=count)
        finished = (tmp_path / "many" / codes.MANIFEST).exists()
        assert finished == (index == count - 1)
    assert snapshot(tmp_path / "many") == whole


def test_codes_of_another_origin_are_refused_and_kept(make_cache, tmp_path):
    before = snapshot(make_cache(tmp_path, 20))
    with pytest.raises(UserError, match="by another autoencoder .autoencoder is first, not second"):
        make_cache(tmp_path, 20, autoencoder="second")
    with pytest.raises(UserError, match="from something else .*num_crops is 1, not 2"):
        make_cache(tmp_path, 20, num_crops=2)
    assert snapshot(tmp_path) == before


def test_too_many_bad_records_stop_before_a_manifest(make_cache, tmp_path):
    with pytest.raises(UserError, match="2 of 40 records are bad"):
        make_cache(tmp_path, 40, bad=(3, 9), max_bad_share=0.03)
    assert not (tmp_path / codes.MANIFEST).exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_bad_records_of_finished_shards_count_after_an_interruption(make_cache, tmp_path):
    with pytest.raises(UserError, match="3 of 40 records are bad"):
        make_cache(tmp_path, 40, bad=(3, 20, 36), max_bad_share=0.05)
    with pytest.raises(UserError, match="3 of 40 records are bad"):
        make_cache(tmp_path, 40, bad=(3, 20, 36), max_bad_share=0.05)


def test_a_label_outside_the_classes_is_a_bad_record(make_cache, tmp_path):
    make_cache(tmp_path, 20, content=encode.Content(num_classes=4))
    assert ids(tmp_path) == [r for r in range(20) if r % 5 != 4]


def test_nothing_good_is_an_error(make_cache, tmp_path):
    with pytest.raises(UserError, match="nothing could be encoded"):
        make_cache(tmp_path, 4, bad=range(4), max_bad_share=1.0)


def test_captions_that_are_cut_are_counted(make_cache, tmp_path):
    source = [{**row, "captions": ["a " * r, "b"]} for r, row in enumerate(pictures(12), 1)]
    make_cache(tmp_path, 12, source=source)
    # Start and end mark leave room for six words.
    assert manifest_of(tmp_path)["captions_truncated"] == 6


class FailsOnce(list):
    """Records, the first read of each of which is an error of the system."""

    def __init__(self, records):
        super().__init__(records)
        self.seen = set()

    def __getitem__(self, index):
        if index not in self.seen:
            self.seen.add(index)
            raise OSError(errno.EIO, "Input/output error")
        return super().__getitem__(index)


def test_a_transient_error_of_the_system_costs_no_record(make_cache, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    make_cache(tmp_path, 20, source=FailsOnce(pictures(20)))
    assert ids(tmp_path) == list(range(20))
    assert not (tmp_path / bad_records.FILE).exists()


class Gate:
    """A codec that waits until another encoder had time to come."""

    def __init__(self, codec):
        self.reached, self.go_on, self.codec = threading.Event(), threading.Event(), codec
        self.num_codes, self.num_tokens = codec.num_codes, codec.num_tokens
        self.decode = codec.decode

    def encode(self, images):
        self.reached.set()
        self.go_on.wait(10)
        return self.codec.encode(images)


def test_two_runs_may_share_a_folder(make_cache, pixel_codec, tmp_path):
    whole = snapshot(make_cache(tmp_path / "whole", 40, source=pictures(40)))
    folder, gate = tmp_path / "shared", Gate(pixel_codec)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(make_cache, folder, 40, source=pictures(40), codec=gate)
        assert gate.reached.wait(10)
        second = pool.submit(make_cache, folder, 40, source=pictures(40))
        # The second run waits for the shard that the first one is at.
        with pytest.raises(TimeoutError):
            second.result(0.3)
        gate.go_on.set()
        first.result(30)
        second.result(30)
    assert snapshot(folder) == whole


@pytest.fixture
def of_3c677fe(tmp_path):
    """A cache that commit 3c677fe wrote; see tests/golden/README.md."""
    with zipfile.ZipFile(GOLDEN / "codes_3c677fe.zip") as archive:
        archive.extractall(tmp_path / "old")
    return tmp_path / "old"


def as_of_3c677fe(make_cache, folder):
    def compute(ids):
        return np.stack([ids, -ids], -1) / np.float32(7)

    content = encode.Content(ClipTokenizer(8), TextFeatures(compute, 2, "seven"))
    crop = Crop(8, random=True, flip=True)
    options = {"crop": crop, "num_crops": 2, "seed": 3, "origin": {"split": "train"}}
    return make_cache(folder, 40, (3,), content, **options)


def visible(folder):
    """Contents of the files, JSON parsed."""
    return {
        name: json.loads(data) if name.endswith(".json") else data
        for name, data in snapshot(folder).items()
        if not name.startswith(".")
    }


def test_a_cache_of_3c677fe_is_what_is_made_today(make_cache, of_3c677fe, tmp_path):
    before = snapshot(of_3c677fe)
    assert snapshot(as_of_3c677fe(make_cache, of_3c677fe)) == before
    assert visible(as_of_3c677fe(make_cache, tmp_path / "new")) == visible(of_3c677fe)
    # An encoding that commit 3c677fe began is finished.
    (of_3c677fe / codes.MANIFEST).unlink()
    (of_3c677fe / "codes-00001-of-00003.array_record").unlink()
    assert visible(as_of_3c677fe(make_cache, of_3c677fe)) == visible(tmp_path / "new")
    wanted = {"split": "train", "autoencoder": "first", "text_encoder": "seven"}
    source = codes.open_split(str(of_3c677fe), wanted)
    assert [record.id for record in source] == [r for r in range(40) if r != 3]


def test_an_autoencoder_has_the_fingerprint_that_3c677fe_gave_it():
    params = {
        "b": {"c": np.arange(6, dtype=np.float32).reshape(2, 3)},
        "a": np.arange(3, dtype="i4"),
    }
    wanted = "85584b826e8549cc3c24516d40cb0465b830570ba149e5804e1c280be1393dcf"
    assert files.fingerprint(params) == wanted


def test_training_is_balanced_by_a_feature_of_the_set(emoji):
    config = emoji_config.get_config()
    config.data.balance_by = ""
    assert encode.record_weights(config, emoji) is None
    config.data.balance_by, config.data.balance_power = "concept", 0.0
    weights = encode.record_weights(config, emoji)
    concepts = [r["concept"] for r in batches.records(emoji, encode.TRAIN, decode=False)]
    total = collections.Counter()
    for concept, weight in zip(concepts, weights, strict=True):
        total[concept] += weight
    assert len(total) == 1272
    np.testing.assert_allclose(list(total.values()), 1.0)
    held = ("woman judge, dark skin tone", "red heart")
    config.data.hold_out = held
    weights = encode.record_weights(config, emoji)
    left_out = np.flatnonzero(weights == 0)
    source = batches.records(emoji, encode.TRAIN, decode=False)
    assert sorted(source[int(i)]["captions"][0] for i in left_out) == sorted(held)
    # The other pictures of a concept take its whole share.
    judges = [w for c, w in zip(concepts, weights, strict=True) if c == "judge"]
    np.testing.assert_allclose(sum(judges), 1.0)
    config.data.hold_out = tuple(
        {r["captions"][0] for r in (source[i] for i in range(len(source)))}
    )
    with pytest.raises(UserError, match="hold_out leaves no training record"):
        encode.record_weights(config, emoji)
    config.data.hold_out = ("no such caption",)
    with pytest.raises(UserError, match="hold_out: no training record has 'no such caption'"):
        encode.record_weights(config, emoji)
    config.data.balance_by = "colour"
    with pytest.raises(
        UserError, match="balance_by='colour'.* has no feature 'colour'; it has capt"
    ):
        encode.record_weights(config, emoji)
