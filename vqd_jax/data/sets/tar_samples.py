"""The samples of a tar of img2dataset or webdataset: members in a row that belong together.

The members of a sample have one name up to their last dot, such as ``key.jpg`` and ``key.txt``.
Further parts may have longer names, such as ``key.seg.png``.
"""

import json
from collections.abc import Iterator
from typing import NamedTuple

from vqd_jax import files
from vqd_jax.data import images
from vqd_jax.data.sets.file_set import Bad, Record, clean
from vqd_jax.data.sets.metadata import captions_of
from vqd_jax.data.sets.tree import Tree, canonical

_TEXTS = ("txt", "json")
# Members that are kept while it is not clear where a sample ends.
_LONGEST_RUN = 1000


class _Part(NamedTuple):
    """A member: its name, the name up to the last dot and up to the first, the rest, the bytes."""

    name: str
    stem: str
    key: str
    kind: str
    data: bytes

    @property
    def is_picture(self) -> bool:
        if self.kind in _TEXTS:
            return False
        return images.has_picture_name(self.name) or images.has_picture_bytes(self.data[:64])


def read(tree: Tree, tar: str) -> Iterator[Record | Bad]:
    """The records of a tar, and what became of every other member.

    Raises:
      UserError: the tar cannot be read.
      RuntimeError: a member was lost: a fault of this program.
    """
    run: list[_Part] = []
    seen: set[str] = set()
    num_members = num_told = 0
    for member in tree.tar(tar):
        num_members += 1
        if member.data is None:
            num_told += 1
            yield Bad(f"{tar}/{member.name}", member.problem)
            continue
        part = _part(member.name, member.data)
        if run and not _goes_on(run, part):
            num_told += len(run)
            yield from _samples(tar, run, seen)
            run = []
        run.append(part)
    num_told += len(run)
    yield from _samples(tar, run, seen)
    if num_members != num_told:
        raise RuntimeError(
            f"{tar} has {num_members} members, of which {num_told} were used or named: a fault of "
            "this program"
        )


def _part(name: str, data: bytes) -> _Part:
    # What is compared has one spelling; the picture keeps that of the tar.
    folder, slash, base = canonical(name).rpartition("/")
    stem, _, kind = base.rpartition(".") if "." in base else (base, "", "")
    return _Part(
        name, folder + slash + stem, folder + slash + base.partition(".")[0], kind.lower(), data
    )


def _goes_on(run: list[_Part], part: _Part) -> bool:
    """Whether a member may belong to a sample of the members before it."""
    if part.key != run[0].key or len(run) >= _LONGEST_RUN:
        return False
    if _extends(part.stem, run[-1].stem) or _extends(run[-1].stem, part.stem):
        return True
    return not all(_is_whole(group) for group in _groups(run).values())


def _extends(longer: str, stem: str) -> bool:
    return longer == stem or longer.startswith(f"{stem}.")


def _is_whole(group: list[_Part]) -> bool:
    has_text = any(part.kind in _TEXTS for part in group)
    return has_text and any(part.is_picture for part in group)


def _groups(run: list[_Part]) -> dict[str, list[_Part]]:
    """The members by sample; what is no sample by itself joins that whose name it extends."""
    groups: dict[str, list[_Part]] = {}
    for part in run:
        groups.setdefault(part.stem, []).append(part)
    for stem in sorted(groups, key=len, reverse=True):
        bases = [other for other in groups if other != stem and _extends(stem, other)]
        if bases and not _is_whole(groups[stem]):
            groups[max(bases, key=len)] += groups.pop(stem)
    return groups


def _samples(tar: str, run: list[_Part], seen: set[str]) -> Iterator[Record | Bad]:
    for stem, group in _groups(run).items():
        yield from _sample(tar, stem, group, seen)


def _sample(tar: str, stem: str, group: list[_Part], seen: set[str]) -> Iterator[Record | Bad]:
    """The record of a sample, or what is wrong with it; and pictures that it has no place for."""
    texts = [part for part in group if part.kind in _TEXTS]
    picture, *more = [p for p in group if p.is_picture] or [None]
    if picture is None and not texts:
        for part in group:
            yield Bad(f"{tar}/{part.name}", "neither a picture nor a text", counts=False)
        return
    if picture is None:
        others = [part.name for part in group if part not in texts]
        reason = (
            f"no picture that this program reads: {others[0]}"
            if others
            else "a text without an image"
        )
        yield Bad(f"{tar}/{stem}", reason)
        return
    file = f"{tar}/{picture.name}"
    for part in more:
        yield Bad(f"{tar}/{part.name}", f"a further picture of {file}", counts=False)
    if stem in seen:
        yield Bad(file, "an earlier sample of this tar has the same key")
        return
    seen.add(stem)
    try:
        yield Record(file, picture.data, clean(_captions(file, texts)))
    except (ValueError, RecursionError) as error:
        yield Bad(file, f"captions: {error}")


def _captions(file: str, texts: list[_Part]) -> list[str]:
    plain = [part for part in texts if part.kind == "txt"]
    if plain:
        return files.decode_text(plain[0].data, file).split("\n")
    if texts:
        return captions_of(json.loads(files.decode_text(texts[0].data, file)))
    return []
