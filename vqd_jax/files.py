"""Files that appear whole or not at all, locks, reads that are tried again, and fingerprints.

Names and texts of other people's programs come in here as well: paths with ``~``, texts in any
encoding, half characters.

Whatever this program writes for later use is written beside its place under a scratch name and
then renamed: a reader sees the old file or the new one, never a part of one.
"""

import codecs
import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from absl import logging

from vqd_jax.errors import UserError

T = TypeVar("T")

_SCRATCH = ".tmp-"
# Errors that remain at another attempt.
_LASTING = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG,
    errno.ELOOP, errno.EROFS, errno.ENOSPC,
}  # fmt: skip
# What to do about an error of the system, where the user can do something.
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make the directory writable"),
}
# What a file system says that has no locks.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # Before UTF-16, whose mark begins alike.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def expanded(path: str) -> str:
    """A path of a flag or field with ``~`` and ``$VARIABLES`` replaced, as a shell does it."""
    return os.path.expanduser(os.path.expandvars(path))


def advice(error: BaseException) -> str:
    """What the user can do about an error of the system; '' if that does not follow from it."""
    number = getattr(error, "errno", None)
    if number is None and "No space left" in str(error):
        # Libraries in C++ report a full disk in words.
        number = errno.ENOSPC
    return _ADVICE.get(number, "")


def decode_text(data: bytes, path: str) -> str:
    """Text as people's programs write it.

    A byte-order mark decides, of UTF-8, UTF-16 or UTF-32. Without one the text is UTF-8, or UTF-16
    if many bytes of its beginning are zero. Other bytes are Windows' Latin letters (code page
    1252), with a warning.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return data.decode(encoding, "replace")
    # Letters of Latin scripts have a zero byte in UTF-16, and text in UTF-8 has none.
    beginning = data[:400]
    if beginning.count(0) > len(beginning) // 4:
        is_little = beginning[1::2].count(0) > beginning[::2].count(0)
        return data.decode("utf-16-le" if is_little else "utf-16-be", "replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        logging.warning("%s is not UTF-8; it is read as Windows' code page 1252", path)
    # Line by line: one that is damaged does not change the letters of the others.
    return "\n".join(map(_decode_line, data.split(b"\n")))


def _decode_line(line: bytes) -> str:
    for encoding in ("utf-8", "cp1252"):
        with contextlib.suppress(UnicodeDecodeError):
            return line.decode(encoding)
    return line.decode("latin-1")


def whole_characters(text: str) -> str:
    """``text`` with U+FFFD for every half of a surrogate pair; whole pairs become one character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def printable(name: str) -> str:
    """A file name that may be stored as UTF-8; bytes that are no UTF-8 become ``\\udc..``."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


@contextlib.contextmanager
def appearing(target: str | os.PathLike) -> Iterator[Path]:
    """A scratch path beside ``target``, to be written; it becomes ``target`` at the end.

    The caller writes a file or makes a folder there. After an error the scratch path is removed and
    ``target`` stays what it was. Several processes may write the same target at once; the last one
    wins. Parent folders are made.

    Raises:
      OSError: the file cannot be written.
    """
    # An absolute path, so that "." and ".." have a name and a parent.
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    # Libraries choose the format by the suffix, so the scratch path keeps that of the target.
    scratch, aside = (
        target.with_name(f"{_SCRATCH}{secrets.token_hex(4)}-{target.name}") for _ in range(2)
    )
    try:
        yield scratch
        if scratch.is_dir():
            if target.exists():
                # A folder cannot replace a folder. Two renames take no time; removing does.
                os.rename(target, aside)
        else:
            with open(scratch, "rb") as file:
                os.fsync(file.fileno())
        os.replace(scratch, target)
    finally:
        for remains in (scratch, aside):
            _remove(remains)


def remove_remains(target: str | os.PathLike) -> None:
    """Removes what killed writers of ``target`` left. Hold a lock: it ends other writers' work."""
    target = Path(os.path.abspath(target))
    for remains in target.parent.glob(f"{_SCRATCH}*-{glob.escape(target.name)}"):
        _remove(remains)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 file that appears whole."""
    with appearing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file that appears whole."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: str | os.PathLike, remedy: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
      path: of the file.
      remedy: what to do about a damaged file; it ends the message.

    Raises:
      UserError: the file is damaged, or does not hold an object.
      OSError: it cannot be read.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; {remedy}")
    return value


@contextlib.contextmanager
def lock(path: str | os.PathLike, *, busy: str | None = None) -> Iterator[None]:
    """Held by one process at a time; the system frees it when the process ends, however it ends.

    Some cluster file systems have no locks. There the work goes on without one, with a warning.

    Args:
      path: of the lock file, which is made and stays.
      busy: what to tell the user if another process holds the lock; None waits for it.

    Raises:
      UserError: another process holds the lock, and ``busy`` is given.
    """
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError as error:
            raise UserError(busy) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logging.warning(
                "the file system of %s has no locks (%s): let no second run work in its folder "
                "meanwhile",
                path,
                error.strerror,
            )
        yield


def read_again(read: Callable[[], T], *, seconds: float = 0.4) -> T:
    """``read()``, tried again after an OSError that may pass: a network file system has such.

    Args:
      read: what to try, three times at most.
      seconds: before the second attempt; before the third, twice as long.

    Raises:
      OSError: the last attempt failed, or the error is of a kind that lasts.
    """
    for pause in (seconds, 2 * seconds):
        try:
            return read()
        except OSError as error:
            if is_lasting(error):
                raise
            time.sleep(pause)
    return read()


def is_lasting(error: OSError) -> bool:
    """Whether another attempt would fail as well, as for a file that is missing."""
    return error.errno is None or error.errno in _LASTING


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'encoder.conv_in.kernel': leaf, ...} of nested dicts."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any], like: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The nested dicts that ``flatten`` made flat, with the keys of ``like``."""
    return {
        key: unflatten(flat, value, f"{prefix}{key}.")
        if isinstance(value, Mapping)
        else flat[f"{prefix}{key}"]
        for key, value in like.items()
    }


def fingerprint(nested: Mapping[str, Any]) -> str:
    """Hexadecimal SHA-256 of nested dicts of arrays and JSON values.

    Two models, runs or caches are the same if and only if their fingerprints are. Put in whatever
    decides the result and nothing else: no path, no date.
    """
    # Imported here: --help and mistakes in flags do not wait for NumPy.
    import numpy as np

    digest = hashlib.sha256()
    flat = flatten(nested)
    for name in sorted(flat):
        value = flat[name]
        if hasattr(value, "dtype"):
            array = np.asarray(value, order="C")
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
        else:
            digest.update(f"{name} {json.dumps(value, sort_keys=True)}".encode())
    return digest.hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """'key: old -> new' for every key of two flat dicts whose values differ, sorted by key."""
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
