import io
import itertools

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from vqd_jax.data import batches, codes, images, order
from vqd_jax.data.batches import Crop
from vqd_jax.data.shard_writer import Content
from vqd_jax.data.text import ClipTokenizer, TextFeatures
from vqd_jax.errors import UserError

RECORDS, LENGTH = 50, 8
NULL = [49406, 49407] + [0] * (LENGTH - 2)


@pytest.fixture(scope="module")
def pictures():
    """Images whose every pixel is the record's number."""
    return [{"image": np.full((8, 8, 3), r, np.uint8)} for r in range(RECORDS)]


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def stored(image, **fields):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return {"image": buffer.getvalue(), **fields}


def test_records_are_decoded_in_any_mode():
    red = (250, 10, 20)
    palette = Image.new("RGB", (4, 6), red).quantize(4)
    for image in (Image.new("RGB", (4, 6), red), Image.new("RGBA", (4, 6), (*red, 255)), palette):
        fields = {"captions": np.array([b"ein Fu\xc3\x9f"], object), "number": np.int64(3)}
        record = batches._decode(batches._texts(stored(image, **fields)))
        assert record["image"].shape == (6, 4, 3)
        assert record["image"].dtype == np.uint8
        assert (record["image"] == red).all()
        assert record["captions"] == ["ein Fuß"]
        assert record["number"] == 3


def test_a_crop_of_bytes_is_the_crop_of_pixels():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    encoded = stored(Image.fromarray(image))
    for crop in (Crop(16), Crop(16, random=True, flip=True)):
        for key in range(8):
            np.testing.assert_array_equal(crop(encoded, 3, key), crop({"image": image}, 3, key))


def test_random_crops_are_functions_of_seed_and_key():
    record = {"image": np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)}
    crop = Crop(16, random=True)
    made = {(s, k): crop(record, s, k).tobytes() for s in range(2) for k in range(8)}
    assert len(set(made.values())) > 8
    assert all(crop(record, *place).tobytes() == pixels for place, pixels in made.items())


def test_half_of_the_crops_are_mirrored_unless_the_caption_says_left_or_right():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :4] = 200
    crop = Crop(8, flip=True)
    for captions, low, high in ((["a dot"], 30, 70), (["a dot on the left"], 0, 0)):
        record = {"image": image, "captions": captions}
        mirrored = [crop(record, 0, key)[0, 0, 0] == 0 for key in range(100)]
        assert low <= sum(mirrored) <= high


def test_training_images_cover_every_epoch_in_a_new_order(pictures):
    stream = iter(batches.image_dataset(pictures, Crop(8), 10, seed=1))
    epochs = [[b["image"] for b in take(stream, 5)] for _ in range(3)]
    assert epochs[0][0].shape == (10, 8, 8, 3)
    assert epochs[0][0].dtype == np.uint8
    orders = [np.concatenate(e)[:, 0, 0, 0] for e in epochs]
    for numbers in orders:
        assert sorted(numbers) == list(range(RECORDS))
    assert not (orders[0] == orders[1]).all()
    assert not (orders[1] == orders[2]).all()
    other = iter(batches.image_dataset(pictures, Crop(8), 10, seed=2))
    assert not (next(other)["image"] == epochs[0][0]).all()


def test_prepared_images_reach_the_batch(emoji):
    source = batches.records(emoji, "validation")
    (batch,) = take(iter(batches.image_dataset(source, Crop(32), 4, seed=0)), 1)
    keys = order.shuffled([len(source)], 0)
    for row, index in zip(batch["image"], range(4), strict=True):
        wanted = images.center_crop(source[int(keys[index])]["image"], 32)
        np.testing.assert_array_equal(row, wanted)


def texts(batch):
    tokenizer = ClipTokenizer(LENGTH)
    return [tokenizer.decode(row) for row in batch["text_ids"]]


def test_training_codes_have_a_caption_of_their_record(cached):
    stream = iter(batches.code_dataset(cached, 25, seed=0, null_text_rate=0.2))
    captions, nulls = {r: set() for r in range(RECORDS)}, 0
    for _ in range(40):
        rows = []
        for batch in take(stream, 2):
            assert batch["codes"].dtype == batch["text_ids"].dtype == np.int32
            assert set(batch) == {"codes", "text_ids"}
            rows += [int(c[0]) for c in batch["codes"]]
            for row, ids, text in zip(rows[-25:], batch["text_ids"], texts(batch), strict=True):
                if ids.tolist() == NULL:
                    nulls += 1
                else:
                    captions[row].add(text)
        assert sorted(rows) == list(range(RECORDS))
    for r, found in captions.items():
        assert {t.replace(" ", "") for t in found} == {f"{r}{i}" for i in range(1 + r % 3)}
    # 2000 captions, each emptied with probability 0.2.
    assert abs(nulls - 400) < 4 * np.sqrt(2000 * 0.2 * 0.8)


def test_captions_do_not_depend_on_the_batch_size(cached):
    def chosen(batch_size, seed):
        dataset = batches.code_dataset(cached, batch_size, seed, null_text_rate=0.3)
        rows = [
            (int(c[0]), tuple(i.tolist()))
            for b in take(iter(dataset), 100 // batch_size)
            for c, i in zip(b["codes"], b["text_ids"], strict=True)
        ]
        return sorted(rows[:50]), sorted(rows[50:])

    assert chosen(10, 0) == chosen(25, 0)
    first, second = chosen(50, 0)
    assert first != second
    assert chosen(50, 1)[0] != first


def test_labels_take_the_place_of_captions(make_cache, tmp_path):
    content = Content(num_classes=5)
    source = codes.open_split(str(make_cache(tmp_path, 50, content=content)))
    stream = iter(batches.code_dataset(source, 50, 0, null_text_rate=0.3))
    nulls = 0
    for batch in take(stream, 20):
        assert set(batch) == {"codes", "label"}
        assert batch["label"].dtype == np.int32
        null = batch["label"] == 5
        np.testing.assert_array_equal(batch["label"][~null], batch["codes"][~null, 0] % 5)
        nulls += null.sum()
    assert abs(nulls - 300) < 4 * np.sqrt(1000 * 0.3 * 0.7)


def test_codes_alone(make_cache, tmp_path):
    source = codes.open_split(str(make_cache(tmp_path, 20, content=Content())))
    (batch,) = take(iter(batches.code_dataset(source, 20, 0, null_text_rate=0.5)), 1)
    assert list(batch) == ["codes"]
    assert sorted(batch["codes"][:, 3]) == list(range(20))


def test_text_features_go_with_their_captions(make_cache, tmp_path):
    def compute(ids):
        return np.stack([ids, -ids], -1) / 8.0

    content = Content(ClipTokenizer(LENGTH), TextFeatures(compute, 2))
    source = codes.open_split(str(make_cache(tmp_path, 30, content=content)))
    stream = iter(batches.code_dataset(source, 30, 0, null_text_rate=0.4))
    for batch in take(stream, 3):
        wanted = compute(batch["text_ids"]).astype(np.float16)
        np.testing.assert_array_equal(batch["text_features"], wanted)
        assert (batch["text_ids"] == NULL).all(1).any()


def test_all_cached_crops_are_used(make_cache, tmp_path):
    rng = np.random.default_rng(0)
    source = [{"image": rng.integers(0, 256, (12, 12, 3), np.uint8), "captions": ["a"]}] * 4
    folder = make_cache(tmp_path, 4, source=source, crop=Crop(8, random=True), num_crops=3, seed=5)
    cache = codes.open_split(str(folder))
    wanted = [
        [Crop(8, random=True)(source[0], 5, 3 * r + c)[0, :6, 0] for c in range(3)]
        for r in range(4)
    ]
    stream = iter(batches.code_dataset(cache, 4, 0, 0.0, with_ids=True))
    used = set()
    for batch in take(stream, 20):
        for r, c, row in zip(batch["id"], batch["crop"], batch["codes"], strict=True):
            np.testing.assert_array_equal(row, wanted[r][c])
            used.add((int(r), int(c)))
    assert len(used) == 12


def test_sets_are_mixed_by_weight(cached, make_cache, tmp_path):
    other = codes.open_split(str(make_cache(tmp_path, 20)))
    options = dict(weights=[3, 1], with_ids=True)
    stream = iter(batches.code_dataset([cached, other], 20, 0, 0.0, **options))
    rows = [(s, i) for b in take(stream, 10) for s, i in zip(b["set"], b["id"], strict=True)]
    assert sum(s == 0 for s, _ in rows) == 150
    # Within each set, every record comes once an epoch.
    for s, count in ((0, 50), (1, 20)):
        ids = [int(i) for t, i in rows if t == s]
        for start in range(0, len(ids) - count + 1, count):
            assert sorted(ids[start : start + count]) == list(range(count))


def test_weights_of_records_go_by_their_numbers_in_the_set(pictures, make_cache, tmp_path):
    # Record 1 is bad, so that row 1 of the cache is record 2.
    source = [dict(p, captions=["a"]) for p in pictures[:6]]
    source[1] = {"image": b"no picture", "captions": ["a"]}
    cache = codes.open_split(str(make_cache(tmp_path, 6, source=source, max_bad_share=0.5)))
    weights = np.array([1.0, 9.0, 5.0, 1.0, 1.0, 2.0])
    stream = batches.code_dataset(cache, 5, 0, 0.0, record_weights=weights, with_ids=True)
    drawn = np.concatenate([batch["id"] for batch in take(iter(stream), 40)])
    np.testing.assert_allclose(np.bincount(drawn, minlength=6), [20, 0, 100, 20, 20, 40], atol=1)
    stream = batches.image_dataset(pictures[:6], Crop(8), 5, 0, record_weights=weights)
    drawn = np.concatenate([b["image"][:, 0, 0, 0] for b in take(iter(stream), 38)])
    np.testing.assert_allclose(np.bincount(drawn, minlength=6), 190 * weights / 19, atol=2)


def test_caches_that_do_not_fit_are_not_mixed(cached, make_cache, tmp_path):
    other = codes.open_split(str(make_cache(tmp_path / "a", 20, autoencoder="second")))
    with pytest.raises(UserError, match="cannot be mixed: they differ in autoencoder"):
        batches.code_dataset([cached, other], 4, 0, 0.0)
    other = codes.open_split(str(make_cache(tmp_path / "b", 20, content=Content())))
    with pytest.raises(UserError, match="cannot be mixed: they differ in context_length"):
        batches.code_dataset([cached, other], 4, 0, 0.0)
    with pytest.raises(UserError, match="weights are .1, 0."):
        batches.code_dataset([cached, cached], 4, 0, 0.0, weights=[1, 0])


def by_kind(kind, cached, pictures, batch_size=8, process=(0, 1)):
    where = dict(process_index=process[0], process_count=process[1])
    if kind == "images":
        broken = [*pictures[:20], {}, *pictures[21:]]
        return batches.image_dataset(
            broken, Crop(8), batch_size, seed=5, max_bad_share=0.1, **where
        )
    sources, weights = (cached, None) if kind == "codes" else ([cached, cached], [0.7, 0.3])
    return batches.code_dataset(
        sources, batch_size, 5, 0.1, weights=weights, with_ids=True, **where
    )


KINDS = pytest.mark.parametrize("kind", ["codes", "mixed", "images"])


# 50 records in batches of 8: epochs end inside batches 7, 13 and 19.
@KINDS
@pytest.mark.parametrize("taken", [0, 3, 6, 11])
def test_state_continues_the_same_batches(cached, pictures, kind, taken):
    stream = iter(by_kind(kind, cached, pictures))
    take(stream, taken)
    state = stream.get_state()
    assert state == {"records": 8 * taken}
    expected = take(stream, 10)
    fresh = iter(by_kind(kind, cached, pictures))
    take(fresh, 2)
    fresh.set_state(state)
    assert_same(take(fresh, 10), expected)


@KINDS
def test_two_processes_go_on_where_one_stopped(cached, pictures, kind):
    alone = iter(by_kind(kind, cached, pictures))
    take(alone, 5)
    state = alone.get_state()
    expected = take(alone, 10)
    parts = []
    for index in range(2):
        part = iter(by_kind(kind, cached, pictures, batch_size=4, process=(index, 2)))
        part.set_state(state)
        parts.append(take(part, 10))
        assert part.get_state() == alone.get_state()
    both = [
        {key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*parts, strict=True)
    ]
    assert_same(both, expected)


def test_no_record_is_lost_or_doubled_as_processes_come_and_go(cached):
    # 1 process, then 2, then 5, then 1 again, with other batch sizes: two epochs of 50.
    seen, state = [], {"records": 0}
    for count, batch_size, steps in ((1, 10, 2), (2, 5, 3), (5, 2, 2), (1, 30, 1)):
        streams = [
            iter(by_kind("codes", cached, None, batch_size, (index, count)))
            for index in range(count)
        ]
        for stream in streams:
            stream.set_state(state)
        for _ in range(steps):
            for stream in streams:
                seen += next(stream)["id"].tolist()
        (state,) = {s["records"]: s for s in (stream.get_state() for stream in streams)}.values()
    assert state == {"records": 100}
    assert sorted(seen[:50]) == sorted(seen[50:]) == list(range(50))


@KINDS
def test_state_is_saved_by_orbax(cached, pictures, kind, tmp_path):
    stream = iter(by_kind(kind, cached, pictures))
    take(stream, 5)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=ocp.args.Composite(data=ocp.args.JsonSave(stream.get_state())))
        expected = take(stream, 9)
    fresh = iter(by_kind(kind, cached, pictures))
    with ocp.CheckpointManager(tmp_path) as manager:
        fresh.set_state(
            manager.restore(5, args=ocp.args.Composite(data=ocp.args.JsonRestore())).data
        )
    assert_same(take(fresh, 9), expected)


def bad_source():
    good = Image.new("RGB", (8, 8), (9, 9, 9))
    rows = [stored(good, captions=[b"a dot"], file=b"%d" % r) for r in range(20)]
    rows[3]["image"] = rows[3]["image"][:50]
    rows[7]["captions"] = []
    rows[11]["captions"] = [b"a dot", b" "]
    rows[12]["image"] = b"no image"
    return grain.MapDataset.source(rows).map(batches._texts).map(batches._decode)


def test_bad_records_are_named_and_skipped(caplog):
    with caplog.at_level("WARNING"):
        dataset = batches.image_dataset(bad_source(), Crop(8), 4, 0, max_bad_share=0.2)
        made = take(iter(dataset), 10)
    assert [len(b["image"]) for b in made] == [4] * 10
    messages = sorted(r.getMessage() for r in caplog.records if "is skipped" in r.getMessage())
    assert len(messages) == 2
    for message, index in zip(messages, (12, 3), strict=True):
        assert message.startswith(f"record {index} is skipped: ValueError: {index}: ")


def test_in_training_the_next_good_record_takes_the_place_of_a_bad_one(pictures):
    broken = [*pictures[:20], {}, {}, *pictures[22:]]
    dataset = batches.image_dataset(broken, Crop(8), 10, 0, max_bad_share=0.1)
    numbers = np.concatenate([b["image"][:, 0, 0, 0] for b in take(iter(dataset), 5)])
    assert sorted(numbers) == sorted([*range(20), 22, 22, 22, *range(23, 50)])


def test_too_many_bad_records_stop_with_the_counts():
    dataset = batches.image_dataset(bad_source(), Crop(8), 4, 0, max_bad_share=0.05)
    with pytest.raises(UserError, match="2 of 20 records are bad.*share of 0.05"):
        take(iter(dataset), 20)


def test_impossible_arguments_are_named(cached, pictures):
    with pytest.raises(ValueError, match="null_text_rate is 1.5"):
        batches.code_dataset(cached, 4, 0, 1.5)
    with pytest.raises(UserError, match="50 records are too few for one batch of 64"):
        batches.image_dataset(pictures, Crop(8), 64, 0)
    with pytest.raises(UserError, match="50 records are too few for one batch of 30 on each of 2"):
        batches.code_dataset(cached, 30, 0, 0.1, process_index=0, process_count=2)
