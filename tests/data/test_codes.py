import numpy as np
import pytest

from vqd_jax.data import codes


def records(count, bad=()):
    class Source:
        def __len__(self):
            return count

        def __getitem__(self, index):
            if index in bad:
                raise OSError("cut short")
            image = np.full((8, 8, 3), index, np.uint8)
            return {"image": image, "captions": [f"number {index}"]}

    return Source()


def encode(images):
    assert images.shape == (4, 8, 8, 3)
    return images[:, 0, :2, 0].astype(np.int32)


def cache(path, source, origin="first", share=0.5):
    return codes.cached_split(
        path, {"from": origin}, source, encode, image_size=8, batch_size=4, max_bad_share=share
    )


def test_every_good_record_once_in_order(tmp_path):
    split = cache(tmp_path / "x.npz", records(10, bad=(3, 9)))
    wanted = [0, 1, 2, 4, 5, 6, 7, 8]
    np.testing.assert_array_equal(split.codes, np.array(wanted)[:, None].repeat(2, 1))
    assert split.codes.dtype == np.uint16
    assert split.captions == [[f"number {i}"] for i in wanted]


def test_a_cache_is_read_again_unless_it_has_another_origin(tmp_path):
    path = tmp_path / "x.npz"
    first = cache(path, records(5))
    kept = cache(path, records(7))
    np.testing.assert_array_equal(first.codes, kept.codes)
    assert len(cache(path, records(7), origin="second").codes) == 7


def test_too_many_bad_records_stop_and_leave_no_cache(tmp_path):
    with pytest.raises(ValueError, match="2 of 10 records are bad"):
        cache(tmp_path / "x.npz", records(10, bad=(3, 9)), share=0.1)
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_sees_values_names_and_shapes():
    base = {"a": np.zeros(4, np.float32)}
    prints = {
        codes.fingerprint(p)
        for p in (base, {"b": base["a"]}, {"a": base["a"].reshape(2, 2)}, {"a": base["a"] + 1})
    }
    assert len(prints) == 4
    assert codes.fingerprint({"a": np.zeros(4, np.float32)}) in prints


@pytest.mark.parametrize("kept", [0, 100, -10])
def test_a_cache_cut_short_is_made_anew(tmp_path, kept):
    path = tmp_path / "x.npz"
    first = cache(path, records(6))
    path.write_bytes(path.read_bytes()[:kept])
    again = cache(path, records(6))
    np.testing.assert_array_equal(first.codes, again.codes)
    assert first.captions == again.captions
