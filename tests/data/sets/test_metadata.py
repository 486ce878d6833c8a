import json
import shutil
import unicodedata

import pytest

from vqd_jax.data import sets
from vqd_jax.data.sets.tree import canonical
from vqd_jax.errors import UserError

NAME = "image_text_folder"


@pytest.fixture
def folder(layout):
    """Twelve pictures, 0000.jpg to 0011 of several kinds, without their metadata."""
    source = layout("jsonl") / "train"
    (source / "metadata.jsonl").unlink()
    return source


@pytest.fixture
def captions(prepared, rows):
    """captions(folder) -> {file: captions} of all splits, and {place: reason} of bad records."""

    def captions(source):
        builder = sets.load(NAME, str(source), prepared, max_bad_share=0.9)
        found = {}
        for split in builder.info.splits:
            found |= {file: r["captions"] for file, r in rows(builder, split).items()}
        return found, {bad["file"]: bad["reason"] for bad in sets.bad_records(builder)}

    return captions


ROWS = [
    ("0000.jpg", "a fox"),
    ("0001.jpg", "two; three, \u201cfour\u201d"),
    ("0002.jpg", "caf\u00e9"),
]
EXPECTED = {name: [text] for name, text in ROWS}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize(("delimiter", "end"), [(",", "\n"), (";", "\r\n"), ("\t", "\r")])
def test_tables_as_programs_write_them(folder, captions, encoding, delimiter, end):
    header = delimiter.join(("File_Name ", "text"))
    lines = [header, *(f'{name}{delimiter}"{text}"' for name, text in ROWS), ""]
    (folder / "metadata.csv").write_bytes(end.join(lines).encode(encoding))
    assert captions(folder) == (EXPECTED, {})


def test_a_field_may_be_long(folder, captions):
    text = "word " * 60_000
    (folder / "metadata.csv").write_text(f"file_name,text\n0000.jpg,{text}\n0001.jpg,b\n")
    assert captions(folder)[0] == {"0000.jpg": [text.strip()], "0001.jpg": ["b"]}


def test_one_bad_row_of_a_table_touches_no_other(folder, captions):
    (folder / "metadata.csv").write_text(
        'file_name,text\n0000.jpg,"never closed\n0001.jpg,one\n0002.jpg,one, two\n'
        '0003.png,\n,"no name"\n0004.jpg,"two\nlines"\n0005.jpg,"with ""marks"""\n'
    )
    found, bad = captions(folder)
    assert found == {
        "0000.jpg": ["never closed"],
        "0001.jpg": ["one"],
        "0004.jpg": ["two lines"],
        "0005.jpg": ['with "marks"'],
    }
    assert bad.pop("metadata.csv#4") == "3 fields in a table of 2 columns; quote the text"
    assert bad.pop("metadata.csv#5") == "none of text, caption, captions"
    assert bad.pop("metadata.csv#6") == "file_name is empty"
    assert not bad


@pytest.mark.parametrize("empty", ["", "\n\n", "file_name,text\n"])
def test_an_empty_table_touches_no_other(folder, captions, empty):
    (folder / "metadata.csv").write_text("file_name,text\n0000.jpg,a fox\n")
    (folder / "new").mkdir()
    (folder / "new/metadata.csv").write_text(empty)
    assert captions(folder) == ({"0000.jpg": ["a fox"]}, {})
    (folder / "metadata.csv").write_text(empty)
    with pytest.raises(UserError, match="metadata.csv has no row with file_name and one of text"):
        captions(folder)


def test_other_columns_are_named_with_what_is_needed(folder, captions):
    (folder / "metadata.csv").write_text("path;words\n0000.jpg;a\n")
    with pytest.raises(UserError, match=r"metadata.csv:1 has the columns path, words; there must"):
        captions(folder)


def test_bad_rows_of_lines_of_json_touch_no_other(folder, captions):
    lines = [
        '{"file_name": "0000.jpg", "text": "cut in the middle \\ud83c"}',
        '{"file_name": "0001.jpg", "text": null, "captions": ["one", null, "two"]}',
        '{"file_name": "0002.jpg", "text": null}',
        "[" * 100_000,
        "7",
        '{"file_name": "0003.png", "text": "whole \\ud83d\\ude00"}',
    ]
    (folder / "metadata.jsonl").write_bytes("\r\n".join(lines).encode("utf-16"))
    found, bad = captions(folder)
    assert found == {
        "0000.jpg": ["cut in the middle"],
        "0001.jpg": ["one", "two"],
        "0003.png": ["whole \U0001f600"],
    }
    assert {place: reason.split(",")[0] for place, reason in bad.items()} == {
        "metadata.jsonl#3": "none of text",
        "metadata.jsonl#4": "nested too deeply",
        "metadata.jsonl#5": "it is no object with fields",
    }


def test_two_spellings_of_a_name_are_one_picture(folder, captions):
    composed, apart = (unicodedata.normalize(form, "caf\u00e9.jpg") for form in ("NFC", "NFD"))
    (folder / "sub").mkdir()
    shutil.copy(folder / "0000.jpg", folder / "sub" / apart)
    names = ["0000.jpg", "./0000.jpg", f"sub\\{composed}", f"sub/{apart}", f"sub//{composed}"]
    lines = [json.dumps({"file_name": n, "text": str(i)}) for i, n in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    found, bad = captions(folder)
    assert found == {"0000.jpg": ["0", "1"], f"sub/{apart}": ["2", "3", "4"]}
    assert not bad
    assert canonical("./a\\.\\b//c") == "a/b/c"


def test_a_picture_of_two_tables_is_one_record(folder, captions):
    source = folder.parent
    (folder / "metadata.jsonl").write_text('{"file_name": "0000.jpg", "text": "inner"}')
    (source / "metadata.jsonl").write_text('{"file_name": "train/0000.jpg", "text": "outer"}')
    shutil.rmtree(source / "validation")
    assert captions(source)[0] == {"train/0000.jpg": ["outer", "inner"]}
