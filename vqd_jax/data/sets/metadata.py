"""Tables that give the captions of pictures: metadata.jsonl and metadata.csv, as programs write
them.

A row has ``file_name`` and ``text`` (or ``caption``, ``captions``). A row that cannot be used is a
bad record; the others are not touched by it.
"""

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from vqd_jax.data.sets.file_set import Item
from vqd_jax.data.sets.tree import Tree, canonical
from vqd_jax.errors import UserError

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.tsv")
_CAPTION_KEYS = ("text", "caption", "captions")
_DELIMITERS = ",;\t|"
# A field may be as long as it likes, but one quotation mark too many must not eat a whole file.
_MAX_LINES_OF_A_ROW = 1000
_LONGEST_FIELD = 2**31 - 1


def items(tree: Tree, names: Iterable[str], pictures: Iterable[str]) -> list[Item]:
    """The items of metadata files; all rows of a picture become one item.

    Args:
      tree: the data directory.
      names: of the metadata files.
      pictures: names of the files that are there; a row may spell them in another way.
    """
    spelled: dict[str, list[str]] = {}
    for picture in pictures:
        spelled.setdefault(canonical(picture), []).append(picture)
    captions: dict[str, list[str]] = {}
    problems = []
    for name in names:
        before, num_rows, num_good = len(problems), 0, 0
        prefix = name[: name.rfind("/") + 1]
        for line, row in _rows(tree, name):
            num_rows += 1
            try:
                file, texts = _file_name(row), captions_of(row)
            except (TypeError, ValueError) as error:
                problems.append(Item(f"{name}#{line}", problem=str(error)))
                continue
            num_good += 1
            file = _as_stored(prefix + file, spelled)
            captions.setdefault(file, []).extend(texts)
        if num_rows != num_good + len(problems) - before:
            raise RuntimeError(f"{name}: {num_rows} rows do not add up: a fault of this program")
        if num_rows and not num_good:
            raise UserError(
                f"{tree.root / name} has no row with file_name and one of "
                f"{', '.join(_CAPTION_KEYS)}: {problems[-1].file} has {problems[-1].problem}"
            )
        logging.info("%s: %d rows, %d of them bad", name, num_rows, num_rows - num_good)
    if not captions:
        raise UserError(
            f"{', '.join(str(tree.root / name) for name in names)} has no row with file_name and "
            f"one of {', '.join(_CAPTION_KEYS)}"
        )
    return [Item(file, tuple(texts)) for file, texts in captions.items()] + problems


def captions_of(row: Any) -> list[str]:
    """The captions in a row or in the JSON beside a picture.

    Raises:
      ValueError: there are none, or they are no texts.
    """
    if not isinstance(row, dict):
        raise ValueError(f"it is no object with fields, but {type(row).__name__}")
    for key in _CAPTION_KEYS:
        if row.get(key) is not None:
            value = row[key]
            texts = [value] if isinstance(value, str) else value
            if isinstance(texts, list):
                texts = [text for text in texts if text is not None]
            if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
                raise ValueError(f"{key} is neither a text nor a list of texts")
            return texts
    raise ValueError(f"none of {', '.join(_CAPTION_KEYS)}")


def _file_name(row: Any) -> str:
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"it is no object with fields, but {type(row).__name__}")
    if "file_name" not in row:
        raise ValueError("no 'file_name'")
    if not isinstance(row["file_name"], str) or not row["file_name"]:
        raise ValueError("file_name is empty")
    return row["file_name"]


def _as_stored(name: str, spelled: Mapping[str, Sequence[str]]) -> str:
    """The name of the file that is meant, or ``name`` in a common spelling if there is none."""
    common = canonical(name)
    stored = spelled.get(common, (name if ".." in name or name.startswith("/") else common,))
    return name if name in stored else stored[0]


def _rows(tree: Tree, name: str) -> Iterator[tuple[int, Any]]:
    """(line, row as a dict, or the error in it) of every row."""
    text = tree.required_text(name)
    if not name.lower().endswith(".jsonl"):
        yield from _table_rows(text, str(tree.root / name))
        return
    # `splitlines` would also cut at separators inside of texts.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except RecursionError:
                yield number, ValueError("nested too deeply")
            except ValueError as error:
                yield number, error


def _table_rows(text: str, path: str) -> Iterator[tuple[int, Any]]:
    """The rows below the header of a text table; the header tells the delimiter."""
    if not text.strip():
        return
    csv.field_size_limit(_LONGEST_FIELD)
    # Line ends of all systems, which stay as they are.
    lines = list(io.StringIO(text, newline=""))
    header, delimiter = [], ","
    for found in _DELIMITERS:
        names = [name.strip().lower() for name in next(csv.reader(lines[:1], delimiter=found), [])]
        if len(names) > len(header) or "file_name" in names:
            header, delimiter = names, found
        if "file_name" in names:
            break
    if "file_name" not in header or not set(header) & set(_CAPTION_KEYS):
        raise UserError(
            f"{path}:1 has the columns {', '.join(header) or 'none'}; there must be file_name and "
            f"one of {', '.join(_CAPTION_KEYS)}, with commas, semicolons or tabs between them"
        )
    number = 1
    while number < len(lines):
        fields, used = _fields(lines, number, delimiter)
        line, number = number + 1, number + used
        while fields and not fields[-1].strip() and len(fields) > len(header):
            fields.pop()
        if not any(field.strip() for field in fields):
            continue
        if len(fields) > len(header):
            told = f"{len(fields)} fields in a table of {len(header)} columns; quote the text"
            yield line, ValueError(told)
            continue
        row = dict(zip(header, fields, strict=False))
        yield line, {key: row[key] or None for key in row} | {"file_name": row["file_name"].strip()}


def _fields(lines: list[str], start: int, delimiter: str) -> tuple[list[str], int]:
    """The fields of the row that begins at a line, and the number of its lines."""
    rest = itertools.islice(lines, start, start + _MAX_LINES_OF_A_ROW)
    reader = csv.reader(rest, delimiter=delimiter, strict=True)
    try:
        return next(reader), reader.line_num
    except csv.Error:
        # A quotation mark that is never closed, or not where it belongs, counts as a letter.
        [fields] = csv.reader(lines[start : start + 1], delimiter=delimiter, quoting=csv.QUOTE_NONE)
        return [field.removeprefix('"').removesuffix('"') for field in fields], 1
