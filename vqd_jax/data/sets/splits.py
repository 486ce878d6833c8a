"""Which split a picture of a folder of one's own belongs to, by the words in its path."""

import collections
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from absl import logging

T = TypeVar("T")

_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_HOLD_OUT = 20


def of_folders(name: str) -> str:
    """The split that the outermost folder names in any case, such as Test or val2014; or ''."""
    for folder in posixpath.dirname(name).lower().split("/"):
        if split := _WORDS.get(re.sub(r"[-_. ]?\d+$", "", folder)):
            return split
    return ""


def of_archive(name: str) -> str:
    """As ``of_folders``; or else the split whose word is in the name, as in pets-test-0000.tar."""
    found = _in_words(posixpath.basename(name))
    return of_folders(name) or (found.pop() if len(found) == 1 else "")


def _in_words(text: str) -> set[str]:
    return {_WORDS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in _WORDS}


def divided(paths: Mapping[T, str], archives: bool) -> dict[str, list[T]]:
    """Items by their split, without an empty key unless some belong to no split.

    Args:
      paths: {item: its name in the data directory}.
      archives: whether items are archives, whose own names tell the split too.
    """
    rule = of_archive if archives else of_folders
    splits: dict[str, list[T]] = {}
    unused = collections.Counter()
    for item, name in paths.items():
        split = rule(name)
        splits.setdefault(split, []).append(item)
        for word in _looks_like(name) - {split}:
            unused[word, name if not split else posixpath.dirname(name)] += 1
    if unused:
        (word, name), _ = unused.most_common(1)[0]
        logging.warning(
            "%d names seem to say %s, but name no split: the first is %s. Only folders (and names "
            "of tars) tell splits: train, validation, test",
            sum(unused.values()), word, name,
        )  # fmt: skip
    return splits


def _looks_like(name: str) -> set[str]:
    """The splits that a path seems to name in any of its parts."""
    *folders, file = name.split("/")
    found = set().union(*map(_in_words, folders))
    # In the name of a file the word must be the first, before a number.
    if match := re.match(r"([a-z]+)[-_. ]?\d", file.lower()):
        found |= {_WORDS[match[1]]} if match[1] in _WORDS else set()
    return found


def with_training(
    splits: Mapping[str, Sequence[T]], what: str, is_usable: Callable[[T], bool]
) -> dict[str, Sequence[T]] | None:
    """The splits of a set, and a word in the log on how they were made.

    What belongs to no split is for training. Where no split is for training, some of it validates.

    Args:
      splits: of ``divided``.
      what: the items in the log, such as "picture".
      is_usable: whether a record can be made of an item; asked of as few as possible.

    Returns:
      {split: items}, or None if there are none for training.
    """
    named = {split: items for split, items in splits.items() if split}
    rest = list(splits.get("", ()))
    if "train" in named:
        named["train"] = rest + list(named["train"])
        told = f"; {len(rest)} outside of them are for training" if rest else ""
        result = named
    elif rest and "validation" in named:
        result, told = {"train": rest} | named, "; all others are for training"
    elif rest:
        result = _with_usable(hold_out(rest), is_usable) | named
        told = f"; of the others every {_HOLD_OUT}th {what} (of fewer, the last one) validates"
    else:
        return None
    where = "folder" if what != "tar" else "folder or tar"
    rule = f"splits by the names of {where}s" if named else f"no {where} names a split"
    counts = ", ".join(f"{split} {len(items)}" for split, items in result.items())
    logging.info("%s%s: %s", rule, told, counts)
    return result


def _with_usable(
    splits: dict[str, Sequence[T]], is_usable: Callable[[T], bool]
) -> dict[str, Sequence[T]]:
    """The splits of ``hold_out``; if all that validates is bad, another item does."""
    train, held = list(splits["train"]), list(splits.get("validation", ()))
    if held and not any(map(is_usable, held)):
        for number in range(len(train) - 1, 0, -1):
            if is_usable(train[number]):
                moved = train.pop(number)
                return {"train": train + held, "validation": [moved]}
    return splits


def hold_out(items: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """Splits of a set that has none: every 20th item validates, of fewer the last one."""
    if len(items) < 2:
        return {"train": items}
    held = set(range(_HOLD_OUT - 1, len(items), _HOLD_OUT)) or {len(items) - 1}
    train = [item for i, item in enumerate(items) if i not in held]
    return {"train": train, "validation": [items[i] for i in sorted(held)]}
