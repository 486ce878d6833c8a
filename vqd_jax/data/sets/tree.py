"""The directory with a publisher's files. It is not trusted: nothing outside it is ever opened.

Names of files and folders are relative to the directory, with "/" between the parts.
"""

import fnmatch
import hashlib
import os
import pickle
import posixpath
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from absl import logging

from vqd_jax import files
from vqd_jax.errors import UserError

# In a prepared set, the file that says what it was made from.
SOURCE = "source.json"
_END_OF_TAR = bytes(1024)
_BLOCK = 512  # bytes of a tar's header, and what its members are padded to
_MAX_MEMBER_BYTES = 2**30
_REFUSED = "a link, a device, over 1 GiB or a name that leads out: refused"
# A folder with all files of a row was written by this program (or by TFDS for it): prepared sets,
# the folders of runs and models, folders of pictures that a model made, and reports on either.
_OURS = (
    ("dataset_info.json", "features.json"),
    ("config.json", ".lock"),
    ("config.json", "*.safetensors"),
    ("manifest.json", "prompts.txt"),
    ("grid_seed*.png",),
    ("model_index.json",),
    ("training_stream.png", "statistics.md"),
    ("report.json", "report.html"),
)


class Member(NamedTuple):
    """A member of a tar: its bytes, or why it has none that can be used."""

    name: str
    data: bytes | None
    problem: str = ""


class ReadError(OSError):
    """The system cannot read a file, which says nothing about its content."""


class Tree:
    """A directory and the zips in it whose members count as files of the directory.

    Args:
      root: the directory.
      zips: names of zips, which are read without being unpacked. They need not exist.

    Raises:
      UserError: no such directory, or a zip that is damaged.
    """

    def __init__(self, root: str | os.PathLike, zips: tuple[str, ...] = ()):
        self.root = Path(root).expanduser().absolute()
        if not self.root.is_dir():
            raise UserError(f"there is no directory {self.root}; config.data.dir must name one")
        self._real_root = os.path.realpath(self.root)
        self._listings: dict[tuple[str, bool], list[str]] = {}
        self._left_out: set[str] = set()
        self._zip_names = tuple(name for name in zips if (self.root / name).is_file())
        self._open_zips()

    def __getstate__(self):
        # Open archives cannot be sent to the workers of Apache Beam.
        return {k: v for k, v in self.__dict__.items() if k not in ("_zips", "_members")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open_zips()

    def _open_zips(self) -> None:
        self._zips = {}
        self._members = {}
        for name in self._zip_names:
            try:
                archive = zipfile.ZipFile(self._path(name))
            except (zipfile.BadZipFile, OSError) as error:
                raise UserError(
                    f"{self.root / name} is cut short or not a zip ({error}); download it again"
                ) from error
            self._zips[name] = archive
            self._members |= {m.filename: archive for m in archive.infolist() if not m.is_dir()}

    def has(self, name: str) -> bool:
        """Whether there is a file or folder of this name."""
        folder = name.rstrip("/") + "/"
        return (
            (self.root / name).exists()
            or name in self._members
            or any(member.startswith(folder) for member in self._members)
        )

    def first(self, what: str, *names: str) -> str:
        """The first of ``names`` that exists.

        Raises:
          UserError: none does; the message says what was looked for and what was found.
        """
        for name in names:
            if self.has(name):
                return name
        found = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(self.root)) or [
            "nothing"
        ]
        more = f" and {len(found) - 12} more" if len(found) > 12 else ""
        raise UserError(
            f"{self.root} has no {what}: looked for {', '.join(names)}; found "
            f"{', '.join(found[:12])}{more}. Is config.data.dir the directory of another data set?"
        )

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
          ValueError: with the reason: the name or a symbolic link leads out of the directory, or
            the file is missing, may not be read, or is damaged in a zip.
          ReadError: the system cannot read the file, at the third attempt too.
        """
        path = self._path(name)
        try:
            if name in self._members and not path.exists():
                return files.read_again(lambda: self._members[name].read(name))
            return files.read_again(path.read_bytes)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise ValueError(f"damaged in the zip: {error}") from error
        except FileNotFoundError:
            raise ValueError("the file is missing") from None
        except OSError as error:
            if files.is_lasting(error):
                raise ValueError(error.strerror or str(error)) from error
            reason = f"{error.strerror}, three times; run again when it can be read"
            raise ReadError(error.errno, reason, str(path)) from error

    def beginning(self, name: str) -> bytes:
        """The first bytes of a file, which tell what it is; none if it cannot be read."""
        try:
            path = self._path(name)
            opened = self._members[name].open(name) if name in self._members else open(path, "rb")
            with opened as file:
                return file.read(64)
        except (OSError, ValueError, RuntimeError, zipfile.BadZipFile):
            return b""

    def required(self, name: str) -> bytes:
        """As ``read``, of a file without which no set can be made.

        Raises:
          UserError: it cannot be read.
        """
        try:
            return self.read(name)
        except ValueError as error:
            raise UserError(f"{self.root / name}: {error}") from error

    def text(self, name: str) -> str:
        """As ``read``, decoded by ``files.decode_text``."""
        return files.decode_text(self.read(name), str(self.root / name))

    def required_text(self, name: str) -> str:
        """As ``required``, decoded by ``files.decode_text``."""
        return files.decode_text(self.required(name), str(self.root / name))

    def strings(self, name: str) -> list[str]:
        """The list of str in a pickle. No code that the pickle names is run.

        Raises:
          UserError: the file holds something else.
        """
        data = BytesIO(self.required(name))
        try:
            value = _ListsOfStrings(data, encoding="latin1").load()
            if not isinstance(value, list) or not all(isinstance(s, str) for s in value):
                raise ValueError("it holds something else")
        # A damaged or hostile pickle fails in many ways.
        except Exception as error:
            raise UserError(
                f"{self.root / name} is not a pickled list of names: {error}"
            ) from error
        return value

    def files(self, folder: str = "", recursive: bool = True) -> list[str]:
        """Sorted names of the files in a folder, without hidden ones and what this program wrote.

        The folder is read once; later calls give the same list.

        Raises:
          UserError: the folder is a symbolic link out of the directory.
        """
        if (folder, recursive) not in self._listings:
            self._listings[folder, recursive] = self._files(folder, recursive)
        return list(self._listings[folder, recursive])

    def _files(self, folder: str, recursive: bool) -> list[str]:
        prefix = f"{folder}/" if folder else ""
        names = [
            name
            for name in self._members
            if name.startswith(prefix) and (recursive or "/" not in name[len(prefix) :])
        ]
        if (path := self.path(folder or ".")).is_dir():
            names += self._walk(path, prefix, recursive)
        return sorted(set(names))

    def _walk(self, path: Path, prefix: str, recursive: bool, first: bool = True) -> Iterator[str]:
        with os.scandir(path) as scanned:
            entries = list(scanned)
        # Not asked of the folder that was named: it may hold a model or a run beside the pictures.
        if not first and _is_ours([entry.name for entry in entries]):
            if prefix not in self._left_out:
                logging.info("%s is left out: this program wrote it", path)
                self._left_out.add(prefix)
            return
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith("."):
                continue
            # Linked folders are not entered: they may lead out, or round in a circle.
            if not entry.is_dir(follow_symlinks=False):
                yield name
            elif recursive and not _is_prepared(entry.name):
                yield from self._walk(Path(entry.path), f"{name}/", recursive, first=False)

    def folders(self, folder: str) -> list[str]:
        """Sorted names of the folders in ``folder`` that hold files, relative to it."""
        prefix = f"{folder}/" if folder else ""
        inner = {n[len(prefix) :] for n in self.files(folder)}
        return sorted({name.split("/")[0] for name in inner if "/" in name})

    def tar(self, name: str) -> Iterator[Member]:
        """The members of a tar in order, also of one whose headers are damaged in places.

        Refused are links, devices, names that lead out of the archive, and more than 1 GiB.

        Raises:
          UserError: the tar cannot be read.
        """
        path = self.path(name)
        try:
            with (
                open(path, "rb") as file,
                # Blocks that are no header are passed over, up to the next that is one.
                tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar,
            ):
                due = 0
                while (member := _next_member(tar)) is not None:
                    yield from _damage(file, due, member.offset)
                    due = tar.offset
                    # The library keeps the headers of all members, which nobody needs.
                    tar.members.clear()
                    if member.isdir():
                        continue
                    # A sparse member may claim any size.
                    small = member.size <= _MAX_MEMBER_BYTES
                    if small and member.isfile() and not _leads_out(member.name):
                        yield Member(member.name, tar.extractfile(member).read())
                    else:
                        yield Member(member.name, None, _REFUSED)
                if not due:
                    raise ValueError("it holds no member of a tar")
                yield from _damage(file, due, file.seek(0, os.SEEK_END))
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            raise UserError(f"{self.root / name} cannot be read: {error}") from error

    def check_tar(self, name: str) -> None:
        """Raises ``UserError`` if the end of a tar is missing because it was cut short."""
        try:
            with open(self.path(name), "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - len(_END_OF_TAR)))
                whole = size % 512 == 0 and file.read() == _END_OF_TAR
        except OSError as error:
            raise UserError(f"{self.root / name} cannot be read: {error}") from error
        if not whole:
            raise UserError(
                f"{self.root / name} is cut short (its end is missing); download it again"
            )

    def content_fact(self, name: str) -> str:
        """Size and hash of what a file holds: the bytes, or the contents of a zip."""
        if name in self._zips:
            members = sorted((m.filename, m.file_size, m.CRC) for m in self._zips[name].infolist())
            return f"{len(members)} members, {_digest(repr(members).encode())}"
        data = self.required(name)
        return f"{len(data)} bytes, {_digest(data)}"

    def listing_fact(self, names: list[str], sizes: bool = False) -> str:
        """Number of files and a hash of their names, and with ``sizes`` of their sizes too."""
        parts = [f"{n} {self._size(n)}" for n in names] if sizes else names
        return f"{len(names)} files, {_digest(chr(10).join(parts).encode(errors='replace'))}"

    def _size(self, name: str) -> int:
        if name in self._members and not (self.root / name).exists():
            return self._members[name].getinfo(name).file_size
        return os.lstat(self.root / name).st_size

    def path(self, name: str) -> Path:
        """Where a file or folder lies.

        Raises:
          UserError: the name or a symbolic link leads out of the directory.
        """
        try:
            return self._path(name)
        except ValueError as error:
            raise UserError(f"{self.root / name}: {error}") from error

    def _path(self, name: str) -> Path:
        if _leads_out(name):
            raise ValueError("the name leads out of the data directory: refused")
        path = self.root / name
        if os.path.commonpath([os.path.realpath(path), self._real_root]) != self._real_root:
            raise ValueError("a symbolic link leads out of the data directory: refused")
        return path


def _leads_out(name: str) -> bool:
    return PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name


def _is_prepared(folder: str) -> bool:
    return folder == "image_text_folder" or folder.startswith("incomplete.")


def _is_ours(names: list[str]) -> bool:
    return any(all(fnmatch.filter(names, pattern) for pattern in patterns) for patterns in _OURS)


def _next_member(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member whose header is whole; a damaged one may follow a sound header of a name."""
    while True:
        try:
            return tar.next()
        except tarfile.ReadError as error:
            if "end of data" in str(error):
                raise
            tar.offset += _BLOCK


def _damage(file: BinaryIO, begin: int, end: int) -> Iterator[Member]:
    """A member that stands for what is no part of a tar between two places of it, if anything."""
    start = begin
    while begin < end:
        file.seek(begin)
        block = file.read(_BLOCK)
        begin += _BLOCK
        # Zeros end a tar, and stand between tars that were joined.
        if not block.strip(b"\0"):
            continue
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            header = None
        if header is None or header.type != tarfile.XGLTYPE:
            yield Member(f"byte {start}", None, "damaged: the header of a member is missing")
            return
        # A header for all members, such as git writes, belongs to none.
        begin += -(-header.size // _BLOCK) * _BLOCK


def _digest(data: bytes) -> str:
    return f"sha256 {hashlib.sha256(data).hexdigest()[:16]}"


def canonical(name: str) -> str:
    """One spelling of a name for all: "/" between its parts, no "./", composed letters.

    Windows writes another separator, and macOS takes letters with accents apart.
    """
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))


class _ListsOfStrings(pickle.Unpickler):
    """Refuses every class and function: lists, numbers and strings need none."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}: refused")
