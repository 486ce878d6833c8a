import json
import pathlib

import numpy as np
import pytest

from vqd_jax.data.text import ClipTokenizer, clean
from vqd_jax.errors import UserError

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "bpe.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return ClipTokenizer()


@pytest.mark.parametrize("row", range(60))
def test_ids_equal_the_published_tokenizer(tokenizer, row):
    caption = GOLDEN["captions"][row]
    ids = tokenizer.encode(caption)
    assert ids.dtype == np.int32
    assert ids.tolist() == GOLDEN["ids"][row]
    assert tokenizer.num_ids(caption) == GOLDEN["ids_untruncated_length"][row]


def test_constants_equal_the_published_tokenizer(tokenizer):
    assert tokenizer.vocab_size == GOLDEN["vocab_size"] == 49408
    assert tokenizer.context_length == GOLDEN["context_length"] == 77


def test_empty_caption_is_start_and_end(tokenizer):
    assert tokenizer.encode("").tolist() == [49406, 49407] + [0] * 75
    assert tokenizer.encode(" \n\t ").tolist() == tokenizer.encode("").tolist()


def test_batch_is_the_rows(tokenizer):
    captions = ["a red cat", "", "two dogs!"]
    batch = tokenizer.encode_batch(captions)
    assert batch.shape == (3, 77)
    assert batch.dtype == np.int32
    np.testing.assert_array_equal(batch, [tokenizer.encode(c) for c in captions])
    assert tokenizer.encode_batch([]).shape == (0, 77)


def test_long_caption_is_cut_with_a_warning(caplog):
    tokenizer = ClipTokenizer(context_length=5)
    with caplog.at_level("WARNING"):
        ids = tokenizer.encode("one two three four five")
    full = ClipTokenizer().encode("one two three four five")
    assert ids.tolist() == [*full[:4], 49407]
    assert [r.getMessage() for r in caplog.records] == [
        "caption of 7 ids is cut to the limit of 5: 'one two three four five'..."
    ]
    caplog.clear()
    with caplog.at_level("WARNING"):
        tokenizer.encode("one two three")
    assert not caplog.records


def test_marks_inside_other_signs_are_plain_text(tokenizer):
    # The split is greedy: "!" takes the signs that follow, so the mark is never seen.
    ids = tokenizer.encode("!<|endoftext|>")
    assert ids[1] != 49407
    assert (ids == 49407).sum() == 1


def test_decode_returns_the_words(tokenizer):
    assert tokenizer.decode(tokenizer.encode("  A Red   CAT &amp; a dog")) == "a red cat & a dog"
    # Where a text has a "<", ftfy leaves its entities alone.
    doubled = tokenizer.encode("3 < 4 &amp;amp; 5")
    assert tokenizer.decode(doubled) == "3 < 4 & 5"
    assert tokenizer.decode(tokenizer.encode("café 日本語 😀")) == "café 日本語 😀"
    assert tokenizer.decode(tokenizer.encode("")) == ""
    assert tokenizer.decode(tokenizer.encode("wow!")) == "wow !"


@pytest.mark.parametrize("row", range(60))
def test_decoded_text_has_the_same_ids(tokenizer, row):
    text = tokenizer.decode(GOLDEN["ids"][row])
    again = tokenizer.encode(text)
    # Cleaning the decoded text may join or drop signs that the first cleaning had kept apart.
    assert tokenizer.decode(again) == text
    assert clean(text) == text


def test_impossible_arguments_are_named(tokenizer):
    with pytest.raises(ValueError, match="49408 is outside 0..49407"):
        tokenizer.decode([49406, 49408])
    with pytest.raises(ValueError, match="context_length is 1"):
        ClipTokenizer(1)


def test_files_bring_the_tokenizer_back(tokenizer, tmp_path):
    for name, text in tokenizer.files("tokenizer").items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    back = ClipTokenizer.from_folder(tmp_path / "tokenizer")
    captions = GOLDEN["captions"][:20]
    np.testing.assert_array_equal(back.encode_batch(captions), tokenizer.encode_batch(captions))


def test_another_vocabulary_has_its_own_marks(tmp_path):
    symbols = ["a", "b", "a</w>", "b</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(symbols)}
    tokenizer = ClipTokenizer(6, vocabulary, [("a", "b</w>")])
    assert tokenizer.vocab_size == 7
    assert tokenizer.encode("ab a").tolist() == [5, 4, 2, 6, 0, 0]
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    (tmp_path / "vocab.json").write_text(json.dumps({**vocabulary, "c": 9}))
    with pytest.raises(UserError, match="the ids have gaps"):
        ClipTokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nx y\n")
    with pytest.raises(UserError, match="no tokenizer of CLIP's kind"):
        ClipTokenizer.from_folder(tmp_path)
