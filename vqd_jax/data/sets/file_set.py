"""What all data sets made from a publisher's files share: how records are read and checked, and the
two ways to prepare them, in this process or by Apache Beam.

A record has `image` (the bytes of the file as published), `captions` (empty in a set without
texts), `file` (its name in the data directory) and, in a set with classes, `label`.
"""

import collections
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from vqd_jax import files
from vqd_jax.data import bad_records, images
from vqd_jax.data.sets.tree import SOURCE, Tree
from vqd_jax.errors import UserError

_ASSETS = epath.resource_path("vqd_jax.data") / "assets"


@dataclasses.dataclass(frozen=True)
class Item:
    """An image that is to be read.

    Attributes:
      file: its name in the data directory.
      captions: as published.
      caption_file: name of a text file with a caption on each line; '' if there is none.
      label: name of the class.
      also: names of further files that belong to it and hold nothing for its record.
      problem: why no record can be made of it; '' if nothing is known against it.
    """

    file: str
    captions: tuple[str, ...] = ()
    caption_file: str = ""
    label: str | None = None
    also: tuple[str, ...] = ()
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Record:
    """An image that was read."""

    file: str
    image: bytes
    captions: list[str]
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class Bad:
    """Something of which no record can be made, and why.

    Attributes:
      file: its name in the data directory.
      reason: in words.
      counts: whether it should have been a record; other files are named, but are no bad records.
    """

    file: str
    reason: str
    counts: bool = True

    def entry(self) -> dict[str, Any]:
        """Its line in ``bad_records.jsonl``."""
        left_out = {} if self.counts else {bad_records.LEFT_OUT: True}
        return {"file": files.printable(self.file), "reason": self.reason} | left_out


def clean(captions: Iterable[str]) -> list[str]:
    """Each caption on one line, without the empty ones.

    Published captions hold replacement characters from earlier conversions, and texts that were cut
    may hold half an emoji; they become spaces.
    """
    whole = (files.whole_characters(text).replace("\ufffd", " ") for text in captions)
    lines = (" ".join(text.replace("\0", " ").split()) for text in whole)
    return [line for line in lines if line]


def read_item(
    tree: Tree, item: Item | str, read_archive: Callable | None = None
) -> Iterator[Record | Bad]:
    """The record of an image and its captions, or those of an archive by ``read_archive``."""
    if isinstance(item, str):
        yield from read_archive(tree, item)
        return
    if item.problem:
        yield Bad(item.file, item.problem)
        return
    try:
        captions = list(item.captions)
        if item.caption_file:
            try:
                captions += tree.text(item.caption_file).split("\n")
            except ValueError as error:
                raise ValueError(f"captions {item.caption_file}: {error}") from error
        yield Record(item.file, tree.read(item.file), clean(captions), item.label)
    except ValueError as error:
        yield Bad(item.file, str(error))


def check(result: Record | Bad, needs_captions: bool) -> Record | Bad:
    """The record, if a model can learn from it; otherwise what is wrong with it."""
    if isinstance(result, Bad):
        return result
    if needs_captions and not result.captions:
        return Bad(result.file, "no caption")
    try:
        # The smallest scale still reads the whole file, and so finds what is cut off.
        images.decode(result.image, min_side=1)
    except ValueError as error:
        return Bad(result.file, str(error))
    return result


def _in_threads(function: Callable, values: Iterable) -> Iterator:
    """``map(function, values)``, in order, by a thread for each core that reads a little ahead."""
    workers = os.cpu_count() or 1
    pending = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        for value in values:
            pending.append(pool.submit(function, value))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _example(record: Record) -> tuple[str, dict]:
    file = files.printable(record.file)
    example = {"image": record.image, "captions": record.captions, "file": file}
    if record.label is not None:
        example["label"] = record.label
    return file, example


class FileSet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder of a set whose files the user has.

    A subclass gives ``facts`` and ``items``, ``labels`` if it has classes, and ``read_archive`` if
    an item may be an archive. Its description and citation are README.md and CITATIONS.bib in
    ``data/assets/<name of the set>``.

    Args:
      tree: the publisher's files.
      max_bad_share: bad records that are tolerated, as a share of all records, 0 to 1.
      beam: whether Apache Beam prepares the set.
      **kwargs: of every TFDS builder.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    HOMEPAGE = ""
    LICENSE = ""
    # Zips in the data directory whose members count as files of it.
    ZIPS: tuple[str, ...] = ()
    NEEDS_CAPTIONS = True

    def __init__(self, *, tree: Tree, max_bad_share: float, beam: bool = False, **kwargs):
        self._tree = tree
        self._max_bad_share = max_bad_share
        self._beam = beam
        self._bad: list[Bad] = []
        self._left_out: list[Bad] = []
        # Results of every split.
        self._told: dict[str, int] = {}
        super().__init__(**kwargs)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.pkg_dir_path = _ASSETS / cls.name

    @classmethod
    def facts(cls, tree: Tree, config: str) -> dict[str, str]:
        """What the prepared set depends on: {file or folder: what it holds}.

        Args:
          tree: the publisher's files.
          config: name of the builder's config, or ''.

        Raises:
          UserError: the directory does not hold this data set.
        """
        raise NotImplementedError

    def items(self) -> dict[str, Sequence[Item | str]]:
        """{split: what is to be read, images or names of archives}."""
        raise NotImplementedError

    @staticmethod
    def read_archive(tree: Tree, name: str) -> Iterator[Record | Bad]:
        """The records of an archive that ``items`` names."""
        raise NotImplementedError

    def listing(self) -> Sequence[str]:
        """Names of the files that are looked over; those that no item names are left out."""
        return ()

    def why_left_out(self, names: Sequence[str]) -> Iterable[str]:
        """The reason for each of these files of ``listing`` that no item names."""
        return ["the lists of the data set do not name it"] * len(names)

    def labels(self) -> Sequence[str] | None:
        """Names of the classes, in the order of their numbers; None in a set without classes."""
        return None

    def _features(self) -> tfds.features.FeaturesDict:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "file": tfds.features.Text(),
        }
        if (labels := self.labels()) is not None:
            features["label"] = tfds.features.ClassLabel(names=list(labels))
        return tfds.features.FeaturesDict(features)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=self._features(), homepage=self.HOMEPAGE, license=self.LICENSE
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # Nothing is downloaded: the licences want that users do it themselves.
        make = self._beam_examples if self._beam else self._generate_examples
        return {name: make(name, items) for name, items in self._items.items()}

    def _generate_examples(self, split: str, items: Sequence[Any]) -> Iterator[tuple[str, dict]]:
        results = (
            result for item in items for result in read_item(self._tree, item, self.read_archive)
        )
        good = bad = 0
        check_one = functools.partial(check, needs_captions=self.NEEDS_CAPTIONS)
        for result in _in_threads(check_one, results):
            if isinstance(result, Record):
                good += 1
                yield _example(result)
                continue
            self._note(result)
            bad += result.counts
            if result.counts:
                self._stop_if_hopeless()
        if not good:
            raise UserError(f"{self.info.full_name}: no record of the split {split!r} can be used")
        self._told[split] = good + bad

    def _note(self, bad: Bad) -> None:
        (self._bad if bad.counts else self._left_out).append(bad)

    def _beam_examples(self, split: str, items: Sequence[Any]):
        import apache_beam as beam

        tree, read_archive, needs_captions = self._tree, self.read_archive, self.NEEDS_CAPTIONS
        bad_path = os.path.join(self.data_dir, f"bad-{split}")

        def examples(item):
            for result in read_item(tree, item, read_archive):
                result = check(result, needs_captions)
                if isinstance(result, Bad):
                    yield beam.pvalue.TaggedOutput("bad", json.dumps(dataclasses.asdict(result)))
                else:
                    yield _example(result)

        @beam.ptransform_fn
        def build(pipeline):
            # Reshuffled, or one worker would get all items.
            source = pipeline | beam.Create(items) | beam.Reshuffle()
            results = source | beam.FlatMap(examples).with_outputs("bad", main="good")
            _ = results.bad | beam.io.WriteToText(bad_path, num_shards=1, shard_name_template="")
            return results.good

        return build()

    def _download_and_prepare(self, dl_manager, download_config) -> None:
        # First, so that loading the set notices a file that changes during the preparation.
        config = self.builder_config.name if self.builder_config else ""
        facts = self.facts(self._tree, config)
        self._items = self.items()
        self._left_out = self._unnamed()
        self._tell_progress_bars()
        try:
            super()._download_and_prepare(dl_manager, download_config)
        except (OSError, UserError):
            raise
        # Beam raises the errors of its workers, and adds to the message where they happened.
        except Exception as error:
            if not self._beam:
                raise
            raise UserError(f"Apache Beam could not prepare {self.name}: {error}") from error
        folder = Path(self.data_dir)
        if self._beam:
            for split in self._items:
                path = folder / f"bad-{split}"
                for entry in bad_records.read(path):
                    self._note(Bad(**entry))
                path.unlink()
        good = sum(split.num_examples for split in self.info.splits.values())
        self._require_sums(good)
        self._check_share(good)
        source = {"facts": facts, "good": good, "bad": len(self._bad)}
        # `source_fingerprint` is a hash of these bytes, and caches of codes name it.
        files.write_text(folder / SOURCE, json.dumps(source, indent=2))
        files.write_text(folder / bad_records.FILE, self.bad_records())

    def _tell_progress_bars(self) -> None:
        """Sets the number of records, which TFDS shows as the length of its progress bars."""
        splits = [
            tfds.core.SplitInfo(name=split, shard_lengths=[len(items)], num_bytes=0)
            for split, items in self._items.items()
            if items and isinstance(items[0], Item)
        ]
        self.info.set_splits(tfds.core.SplitDict(splits))

    def bad_records(self) -> str:
        """Lines of JSON with `file` and `reason` of the bad records so far, sorted by file."""
        found = sorted(self._bad + self._left_out, key=lambda bad: (bad.file, bad.reason))
        return bad_records.to_lines(bad.entry() for bad in found)

    def _unnamed(self) -> list[Bad]:
        """The files of ``listing`` that no item names."""
        named = set()
        for item in (item for items in self._items.values() for item in items):
            named |= {item} if isinstance(item, str) else {item.file, item.caption_file, *item.also}
        left = [name for name in self.listing() if name not in named]
        reasons = self.why_left_out(left)
        return [Bad(*pair, counts=False) for pair in zip(left, reasons, strict=True)]

    def _require_sums(self, good: int) -> None:
        """Logs what became of everything, and refuses a set in which something was lost."""
        bad, left = len(self._bad), len(self._left_out)
        logging.info(
            "%s: %d records and %d bad records of %d items; %d further files and members are "
            "left out%s",
            self.info.full_name, good, bad, sum(map(len, self._items.values())), left,
            f", the first is {self._left_out[0].file} ({self._left_out[0].reason})" if left else "",
        )  # fmt: skip
        # Archives count their members themselves.
        sums = [
            (split, len(items), self._told.get(split, len(items)))
            for split, items in self._items.items()
            if all(isinstance(item, Item) for item in items)
        ]
        if len(sums) == len(self._items):
            sums.append(("of all splits", sum(n for _, n, _ in sums), good + bad))
        for split, wanted, told in sums:
            if wanted != told:
                raise RuntimeError(
                    f"{self.info.full_name}: {wanted} items of the split {split} gave {told} "
                    "records and bad records: a fault of this program"
                )

    def _stop_if_hopeless(self) -> None:
        """Stops as soon as the share is exceeded even if all other records are good."""
        if all(isinstance(item, Item) for items in self._items.values() for item in items[:1]):
            self._check_share(sum(map(len, self._items.values())) - len(self._bad))

    def _check_share(self, good: int) -> None:
        if self._bad:
            bad, last = len(self._bad), self._bad[-1]
            bad_records.require_share(
                bad,
                bad + good,
                self._max_bad_share,
                f"{self.info.full_name}: at least ",
                f"the last one is {last.file} ({last.reason})",
            )
