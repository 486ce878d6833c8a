"""Bad records: what a data set holds but nothing can be learnt from.

Whoever meets a bad record counts it, names it in a file of JSON lines, and leaves it out. Too many
of them end the program. A record is bad because of its content alone: an error of the system while
reading says nothing about the record, so the read is tried again, and then the error is raised.
"""

import errno
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import logging

from vqd_jax import files
from vqd_jax.errors import UserError

T = TypeVar("T")

# The file that names bad records, wherever it stands.
FILE = "bad_records.jsonl"
# Marks the entry of a file that was never meant to be a record, such as a licence.
LEFT_OUT = "left_out"


def to_lines(entries: Iterable[Mapping[str, Any]]) -> str:
    """One line of JSON for each entry."""
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def append(path: str | os.PathLike, entry: Mapping[str, Any]) -> None:
    """Adds an entry to a file of bad records, which several processes may share."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # A single unbuffered write in append mode: lines of several processes do not mix.
    with open(path, "ab", buffering=0) as file:
        file.write(to_lines([entry]).encode())


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The entries of a file of bad records; [] if there is no file.

    A line that a kill cut short is left out: its record will be found again.
    """
    if not os.path.exists(path):
        return []
    entries = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "reason" in entry:
            entries.append(entry)
    return entries


def require_share(bad: int, total: int, max_bad_share: float, what: str, last: str) -> None:
    """Refuses to go on if too many records are bad.

    Args:
      bad, total: numbers of records.
      max_bad_share: bad records that are tolerated, as a share of all records, 0 to 1.
      what: begins the message, such as "cub_text: at least ", or is empty.
      last: where to look, such as "the last one is 3.png (empty)".

    Raises:
      UserError: the share is exceeded; the message has the counts.
    """
    if bad > max_bad_share * total:
        raise UserError(
            f"{what}{bad} of {total} records are bad, more than the tolerated share of "
            f"{max_bad_share}; {last}. Repair or remove them, or raise config.data.max_bad_share"
        )


def read_stored(read: Callable[[], T]) -> T:
    """``read()``, tried again after an error of the system.

    Args:
      read: reads a record; may use array_record, which raises RuntimeError for every error.

    Raises:
      OSError: the system cannot read the record.
      Exception: what ``read`` raises of damaged content.
    """

    def attempt() -> T:
        try:
            return read()
        except RuntimeError as error:
            # Such as "pread() failed: Input/output error"; damage is "Corrupted ...".
            if "() failed: " in str(error):
                raise OSError(errno.EIO, str(error)) from error
            raise

    return files.read_again(attempt)


class CheckedReader:
    """Reads records by index; a bad one is counted, named in a log, and given as None.

    A record is bad if reading it raises anything but an error of the system, or if captions are
    needed and it has none or an empty one. Several threads may read at once, and several processes
    may share ``bad_log``.

    Args:
      source: random-access records.
      max_bad_share: bad records that are tolerated, as a share of all records, 0 to 1.
      bad_log: a file that gets an entry ``{"record": index, "reason": text}`` for each bad record;
        the records that it names already count.
      needs_captions: whether a record without a caption is a bad one.

    Attributes:
      bad: {index: reason} of the bad records that are known.
    """

    def __init__(
        self,
        source: Sequence[dict],
        max_bad_share: float = 0.01,
        bad_log: str | None = None,
        needs_captions: bool = True,
    ):
        self.bad: dict[int, str] = {}
        self._source = source
        self._needs_captions = needs_captions
        self._max_bad_share = max_bad_share
        self._bad_log = bad_log
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._source)

    def __call__(self, index: int, transform: Callable[[dict], dict] | None = None) -> dict | None:
        """The record at ``index``, or what ``transform`` makes of it; None if it is bad.

        Raises:
          UserError: more than the tolerated share of the records is bad.
          OSError: the system cannot read the record, at the third attempt too.
        """
        try:
            record = read_stored(lambda: self._source[index])
            if self._needs_captions:
                _require_captions(record)
            return record if transform is None else transform(record)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            self._report(index, f"{type(error).__name__}: {error}")
            return None

    def _report(self, index: int, reason: str) -> None:
        with self._lock:
            for entry in read(self._bad_log) if self._bad_log else []:
                self.bad.setdefault(int(entry["record"]), entry["reason"])
            if index not in self.bad:
                self.bad[index] = reason
                logging.warning("record %d is skipped: %s", index, reason)
                if self._bad_log:
                    append(self._bad_log, {"record": index, "reason": reason})
            bad = len(self.bad)
        last = f"the last one is record {index} ({reason})"
        require_share(bad, len(self._source), self._max_bad_share, "", last)


def _require_captions(record: dict) -> None:
    captions = record["captions"]
    if len(captions) == 0 or not all(str(c).strip() for c in captions):
        raise ValueError(f"{record.get('file', 'record')}: empty caption")
