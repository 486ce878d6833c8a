import io

import numpy as np
import pytest
from PIL import Image

from vqd_jax.data import batches, codes, encode, report
from vqd_jax.data.text import ClipTokenizer


class Codec:
    """As coarse as can be: a picture is its mean, one code four times."""

    num_codes, num_tokens = 256, 4

    def encode(self, images):
        return images.mean(axis=(1, 2, 3))[:, None].repeat(4, 1).astype(np.int32)

    def decode(self, tokens):
        return np.asarray(tokens)[:, :1, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)


def png(height, width, value, mode="RGB"):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (value,) * 3).convert(mode).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def source():
    rows = [
        {"image": png(8, 8 + 2 * r, 10 * r), "captions": [f"number {r}", "the same"]}
        for r in range(12)
    ]
    return rows


CONTENT = encode.Content(ClipTokenizer(4))
STREAM = {"count": 12, "seed": 3, "null_text_rate": 0.3}


def test_the_sheet_shows_what_training_is_given(source, tmp_path):
    crop = batches.Crop(8, random=True)
    encode.encode_split(
        str(tmp_path), source, Codec(), {}, crop=crop, num_crops=2, seed=3, content=CONTENT
    )
    cache = codes.open_split(str(tmp_path))
    dataset = batches.code_dataset(cache, 12, 3, 0.3, with_ids=True)
    batch = next(iter(dataset))
    samples = report.cached_samples(cache, source, Codec(), crop, CONTENT, **STREAM)
    assert [s.record for s in samples] == batch["id"].tolist()
    for sample, row, ids in zip(samples, batch["codes"], batch["text_ids"], strict=True):
        assert sample.crop.mean() == 10 * sample.record == row[0]
        assert (sample.reconstruction == row[0]).all()
        assert sample.text == CONTENT.tokenizer.decode(ids)
    assert {"", "the same"} < {sample.text for sample in samples}

    # Without the cache the same is found from the source.
    again = report.source_samples(source, Codec(), crop, 2, CONTENT, **STREAM)
    for ours, theirs in zip(again, samples, strict=True):
        assert (ours.record, ours.text) == (theirs.record, theirs.text)
        np.testing.assert_array_equal(ours.crop, theirs.crop)
        np.testing.assert_array_equal(ours.reconstruction, theirs.reconstruction)


def test_labels_are_shown(source):
    rows = [{**row, "label": r} for r, row in enumerate(source)]
    content = encode.Content(num_classes=12)
    samples = report.source_samples(rows, None, batches.Crop(8), 1, content, **STREAM)
    assert {s.text for s in samples} > {""}
    assert all(s.text in ("", f"class {s.record}") for s in samples)


def test_the_contact_sheet_has_every_crop_beside_its_reconstruction():
    samples = [
        report.Sample(
            r, np.full((8, 8, 3), 20 * r, np.uint8), np.full((8, 8, 3), 20 * r + 9, np.uint8), "x"
        )
        for r in range(5)
    ]
    sheet = np.asarray(report.contact_sheet(samples, columns=3))
    side, margin = 96, 8
    height = side + 4 + 45
    assert sheet.shape == (margin + 2 * (height + margin), margin + 3 * (2 * side + margin), 3)
    for r in range(5):
        top = margin + r // 3 * (height + margin)
        left = margin + r % 3 * (2 * side + margin)
        assert (sheet[top : top + side, left : left + side] == 20 * r).all()
        assert (sheet[top : top + side, left + side : left + 2 * side] == 20 * r + 9).all()
        below = sheet[top + side + 4 : top + height, left : left + 2 * side]
        assert below.min() < 100


def test_the_page_counts_what_is_there(source):
    train = [
        *source,
        {"image": b"none", "captions": ["a"]},
        {"image": png(20, 30, 1, "L"), "captions": ["a very long caption"]},
        {"image": source[3]["image"], "captions": ["another one"]},
        {"image": png(8, 8, 3), "captions": [""]},
    ]
    other = [{"image": source[5]["image"], "captions": ["Number  7"]}]
    found = {
        name: report.statistics(rows, CONTENT) for name, rows in (("train", train), ("test", other))
    }
    assert sorted(found["train"].bad) == [12, 15]
    lines = report.page("plain/1.0.0", found, CONTENT).splitlines()
    for line in (
        "# plain/1.0.0",
        "- records: 16 (all read)",
        "- bad records in the prepared set: 2 (12.50%)",
        "  - record 12: ValueError: not an image of a known format",
        "  - record 15: ValueError: record: empty caption",
        "- width: 8 to 30, median 19 pixels",
        "- height: 8 to 20, median 8 pixels",
        "- colour modes: RGB 13, L 1",
        "- captions of a record: 1 to 2, median 2",
        "- captions cut to 4 ids: 3 of 26 (11.54%)",
        "- images that several records have: 1",
        "  - records 3, 14",
        "- captions that several records have: 1",
        "  - 'the same': records 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 …",
        "- train and test: 1 images, 1 captions",
        "  - record 5 is record 0",
    ):
        assert any(found.startswith(line) for found in lines), line


def test_a_large_split_is_read_in_part(source):
    found = report.statistics(source, CONTENT, max_records=4)
    assert (found.num_records, found.inspected) == (12, 4)
    assert found.widths == [8, 14, 20, 26]
    page = report.page("x", {"train": found}, CONTENT)
    assert "- records: 12 (4 spread evenly read)" in page
