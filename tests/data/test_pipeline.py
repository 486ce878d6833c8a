import io
import itertools

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from vqd_jax.data import pipeline

RECORDS, TOKENS, LENGTH = 50, 6, 8
NULL = [49406, 49407] + [0] * (LENGTH - 2)


@pytest.fixture(scope="module")
def cached():
    """Codes that name their record, and captions that name their record and number."""
    codes = np.arange(RECORDS, dtype=np.uint16)[:, None].repeat(TOKENS, 1)
    ids = [np.full((1 + r % 3, LENGTH), 100 * r, np.int32) for r in range(RECORDS)]
    for captions in ids:
        captions += np.arange(len(captions), dtype=np.int32)[:, None]
    return codes, ids


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
        record = pipeline._decode(stored(image, **fields))
        assert record["image"].shape == (6, 4, 3)
        assert record["image"].dtype == np.uint8
        assert (record["image"] == red).all()
        assert record["captions"] == ["ein Fuß"]
        assert record["number"] == 3


def test_resize_keeps_the_right_size():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    assert pipeline.resize(image, 16) is image


@pytest.mark.parametrize("shape", [(20, 60), (60, 20)])
def test_resize_cuts_the_centre(shape):
    image = np.zeros((*shape, 3), np.uint8)
    long = int(np.argmax(shape))
    index = [slice(None)] * 2
    index[long] = slice(20, 40)
    image[tuple(index)] = 200
    small = pipeline.resize(image, 10)
    assert small.shape == (10, 10, 3)
    assert small.dtype == np.uint8
    assert (small == 200).all()


def test_resize_averages_fine_detail():
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    small = pipeline.resize(checks, 16)[2:-2, 2:-2].astype(float)
    assert abs(small.mean() - 127.5) < 2
    assert small.std() < 2


def test_resize_rejects_other_arrays():
    with pytest.raises(ValueError, match=r"float32 \(4, 4, 3\)"):
        pipeline.resize(np.zeros((4, 4, 3), np.float32), 4)
    with pytest.raises(ValueError, match=r"uint8 \(4, 4\)"):
        pipeline.resize(np.zeros((4, 4), np.uint8), 4)


def test_training_images_cover_every_epoch_in_a_new_order(pictures):
    stream = iter(pipeline.image_dataset(pictures, 8, 10, seed=1, train=True))
    epochs = [[b["image"] for b in take(stream, 5)] for _ in range(3)]
    assert epochs[0][0].shape == (10, 8, 8, 3)
    assert epochs[0][0].dtype == np.uint8
    orders = [np.concatenate(e)[:, 0, 0, 0] for e in epochs]
    for order in orders:
        assert sorted(order) == list(range(RECORDS))
    assert not (orders[0] == orders[1]).all()
    assert not (orders[1] == orders[2]).all()
    other = iter(pipeline.image_dataset(pictures, 8, 10, seed=2, train=True))
    assert not (next(other)["image"] == epochs[0][0]).all()


def test_evaluation_images_come_once_in_order(pictures):
    batches = list(pipeline.image_dataset(pictures, 8, 8, seed=1, train=False))
    order = np.concatenate([b["image"] for b in batches])[:, 0, 0, 0]
    assert order.tolist() == list(range(48))


def test_prepared_images_reach_the_batch(emoji):
    source = pipeline.records(emoji, "validation")
    batch = next(iter(pipeline.image_dataset(source, 32, 4, seed=0, train=False)))["image"]
    for row, index in zip(batch, range(4), strict=True):
        np.testing.assert_array_equal(row, pipeline.resize(source[index]["image"], 32))


def test_training_codes_have_a_caption_of_their_record(cached):
    stream = iter(pipeline.code_dataset(*cached, 25, seed=0, null_text_rate=0.2, train=True))
    captions, nulls = {r: set() for r in range(RECORDS)}, 0
    for batch in take(stream, 200):
        assert batch["codes"].shape == (25, TOKENS)
        assert batch["codes"].dtype == np.int32
        assert batch["text_ids"].shape == (25, LENGTH)
        assert batch["text_ids"].dtype == np.int32
        for codes, ids in zip(batch["codes"], batch["text_ids"], strict=True):
            assert (codes == codes[0]).all()
            if ids.tolist() == NULL:
                nulls += 1
                continue
            record, caption = divmod(ids[0], 100)
            assert (ids == ids[0]).all()
            assert record == codes[0]
            captions[record].add(int(caption))
    assert {r: len(c) for r, c in captions.items()} == {r: 1 + r % 3 for r in captions}
    # 5,000 draws: standard deviation 0.006.
    assert abs(nulls / 5_000 - 0.2) < 0.023


def test_captions_are_chosen_evenly(cached):
    stream = iter(pipeline.code_dataset(*cached, 50, seed=4, null_text_rate=0.0, train=True))
    ids = np.concatenate([b["text_ids"][:, 0] for b in take(stream, 100)])
    three = ids[(ids // 100) % 3 == 2] % 100
    assert len(three) == 16 * 100
    # 1,600 draws of three: standard deviation of a share 0.012.
    np.testing.assert_allclose(np.bincount(three) / len(three), 1 / 3, atol=0.048)


def test_choices_depend_on_seed_record_and_epoch_alone(cached):
    def chosen(batch_size, seed):
        dataset = pipeline.code_dataset(*cached, batch_size, seed, null_text_rate=0.3, train=True)
        rows = [
            (int(c[0]), int(i[0]))
            for b in take(iter(dataset), 100 // batch_size)
            for c, i in zip(b["codes"], b["text_ids"], strict=True)
        ]
        return sorted(rows[:50]), sorted(rows[50:])

    assert chosen(10, 0) == chosen(25, 0)
    first, second = chosen(50, 0)
    assert first != second
    assert chosen(50, 1)[0] != first


def test_evaluation_codes_have_the_first_caption(cached):
    batches = list(pipeline.code_dataset(*cached, 20, seed=0, null_text_rate=0.9, train=False))
    assert len(batches) == 2
    codes = np.concatenate([b["codes"][:, 0] for b in batches])
    ids = np.concatenate([b["text_ids"][:, 0] for b in batches])
    assert codes.tolist() == list(range(40))
    assert ids.tolist() == [100 * r for r in range(40)]


@pytest.mark.parametrize("train", [True, False])
def test_processes_share_the_stream_of_one(cached, monkeypatch, train):
    def order(batch_size, steps):
        dataset = pipeline.code_dataset(*cached, batch_size, 3, null_text_rate=0.2, train=train)
        return [b["text_ids"] for b in take(iter(dataset), steps)]

    alone = order(12, 9)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    parts = []
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        parts.append(order(6, 9))
    assert len(parts[0]) == len(parts[1]) == len(alone) == (9 if train else 4)
    for whole, even, odd in zip(alone, *parts, strict=True):
        np.testing.assert_array_equal(whole[0::2], even)
        np.testing.assert_array_equal(whole[1::2], odd)


def datasets(cached, pictures):
    codes = pipeline.code_dataset(*cached, 8, seed=5, null_text_rate=0.1, train=True)
    broken = [*pictures[:20], {}, *pictures[21:]]
    images = pipeline.image_dataset(broken, 8, 8, seed=5, train=True, max_bad_share=0.1)
    return {"codes": codes, "images": images}


# 50 records in batches of 8: epochs end inside batches 7, 13 and 19.
@pytest.mark.parametrize("kind", ["codes", "images"])
@pytest.mark.parametrize("taken", [0, 3, 6, 11])
def test_state_continues_the_same_batches(cached, pictures, kind, taken):
    stream = iter(datasets(cached, pictures)[kind])
    take(stream, taken)
    state = stream.get_state()
    expected = take(stream, 10)
    fresh = iter(datasets(cached, pictures)[kind])
    take(fresh, 2)
    fresh.set_state(state)
    assert_same(take(fresh, 10), expected)


@pytest.mark.parametrize("kind", ["codes", "images"])
def test_state_is_saved_by_orbax(cached, pictures, kind, tmp_path):
    stream = iter(datasets(cached, pictures)[kind])
    take(stream, 5)
    with ocp.CheckpointManager(tmp_path) as manager:
        args = ocp.args.Composite(data=grain.checkpoint.CheckpointSave(stream))
        manager.save(5, args=args)
        expected = take(stream, 9)
    fresh = iter(datasets(cached, pictures)[kind])
    with ocp.CheckpointManager(tmp_path) as manager:
        args = ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh))
        manager.restore(5, args=args)
    assert_same(take(fresh, 9), expected)


def bad_source():
    good = Image.new("RGB", (8, 8), (9, 9, 9))
    rows = [stored(good, captions=[b"a dot"], file=b"%d" % r) for r in range(20)]
    rows[3]["image"] = rows[3]["image"][:50]
    rows[7]["captions"] = []
    rows[11]["captions"] = [b"a dot", b" "]
    rows[12]["image"] = b"no image"
    return grain.MapDataset.source(rows).map(pipeline._decode)


def test_bad_records_are_named_and_skipped(caplog):
    with caplog.at_level("WARNING"):
        batches = list(pipeline.image_dataset(bad_source(), 8, 4, 0, False, max_bad_share=0.2))
    assert [len(b["image"]) for b in batches] == [4] * 4
    messages = sorted(r.getMessage() for r in caplog.records if "is skipped" in r.getMessage())
    assert len(messages) == 4
    for message, index in zip(messages, (11, 12, 3, 7), strict=True):
        assert message.startswith(f"record {index} is skipped: ValueError: {index}: ")


def test_bad_records_are_counted_once():
    read = pipeline.CheckedReader(bad_source(), max_bad_share=0.2)
    for _ in range(3):
        given = [read(i) for i in range(20)]
    assert [i for i, r in enumerate(given) if r is None] == [3, 7, 11, 12] == sorted(read.bad)
    assert given[0]["captions"] == ["a dot"]


def test_too_many_bad_records_stop_with_the_counts():
    dataset = pipeline.image_dataset(bad_source(), 8, 4, 0, True, max_bad_share=0.15)
    with pytest.raises(ValueError, match="4 of 20 records are bad.*share of 0.15"):
        take(iter(dataset), 20)


def test_impossible_arguments_are_named(cached, pictures):
    codes, ids = cached
    with pytest.raises(ValueError, match="50 rows of codes but captions of 49 records"):
        pipeline.code_dataset(codes, ids[:-1], 4, 0, 0.1, True)
    with pytest.raises(ValueError, match="record 49 has no caption"):
        pipeline.code_dataset(codes, [*ids[:-1], ids[0][:0]], 4, 0, 0.1, True)
    with pytest.raises(ValueError, match="null_text_rate is 1.5"):
        pipeline.code_dataset(codes, ids, 4, 0, 1.5, True)
    with pytest.raises(ValueError, match="50 records are too few for one batch of 64"):
        pipeline.image_dataset(pictures, 8, 64, 0, True)
