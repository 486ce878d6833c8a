"""What all data sets made from a publisher's files share: records, bad records, the bond to the
files, and the two ways to prepare: in this process, or by Apache Beam.

Every record has `image` (the file as published, never encoded anew), `captions` (empty in sets
without texts), `file` (its name in the data directory), and `label` in sets with classes.
"""

import collections
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from vqd_jax.data import images
from vqd_jax.data.sets.tree import Tree
from vqd_jax.errors import UserError

BAD_RECORDS = "bad_records.jsonl"
SOURCE = "source.json"
_HOLD_OUT = 20


@dataclasses.dataclass(frozen=True)
class Item:
    """One image to read.

    Attributes:
      file: its name in the data directory.
      captions: its captions, as published.
      caption_file: name of a text file with one caption a line; '' if there is none.
      label: name of its class.
      problem: why it cannot become a record, if that is known before anything is read.
    """

    file: str
    captions: tuple[str, ...] = ()
    caption_file: str = ""
    label: str | None = None
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Record:
    """One image as read."""

    file: str
    image: bytes
    captions: list[str]
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class Bad:
    """What cannot become a record, and why."""

    file: str
    reason: str


def clean(captions: Iterable[str]) -> list[str]:
    """Captions on one line each, empty ones left out.

    The replacement characters that earlier conversions left in published captions become spaces.
    """
    lines = (" ".join(text.replace("\ufffd", " ").split()) for text in captions)
    return [line for line in lines if line]


def read_item(tree: Tree, item: Item) -> Iterator[Record | Bad]:
    """Reads one image file and its captions."""
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
    """The record if a model can be trained on it, else what is wrong with it."""
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


def hold_out(items: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """Splits for a set that comes without: every 20th for validation, of fewer the last one."""
    if len(items) < 2:
        return {"train": items}
    held = set(range(_HOLD_OUT - 1, len(items), _HOLD_OUT)) or {len(items) - 1}
    train = [item for i, item in enumerate(items) if i not in held]
    return {"train": train, "validation": [items[i] for i in sorted(held)]}


def check_share(name: str, bad: int, total: int, max_bad_share: float, last: str = "") -> None:
    """Raises UserError if more than the tolerated share of records is bad."""
    if bad > max_bad_share * total:
        raise UserError(
            f"{name}: at least {bad} of {total} records are bad, more than the tolerated share of "
            f"{max_bad_share}{last}. Repair or remove them, or raise config.data.max_bad_share"
        )


def _in_threads(function: Callable, values: Iterable) -> Iterator:
    """``map(function, values)`` on all cores, in order, few values ahead."""
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
    example = {"image": record.image, "captions": record.captions, "file": record.file}
    if record.label is not None:
        example["label"] = record.label
    return record.file, example


class FileSet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder of a set whose files the user has.

    Args:
      tree: the publisher's files.
      max_bad_share: bad records tolerated, as a share of all records, 0 to 1.
      beam: whether Apache Beam prepares the set.
      **kwargs: of every TFDS builder.
    """

    ZIPS: tuple[str, ...] = ()
    NEEDS_CAPTIONS = True

    def __init__(self, *, tree: Tree, max_bad_share: float, beam: bool = False, **kwargs):
        self._tree = tree
        self._max_bad_share = max_bad_share
        self._beam = beam
        self._bad: list[Bad] = []
        super().__init__(**kwargs)

    @classmethod
    def facts(cls, tree: Tree, config: str) -> dict[str, str]:
        """What the prepared set depends on: {file or folder: what it holds}.

        Raises:
          UserError: the directory does not hold this data set.
        """
        raise NotImplementedError

    def items(self) -> dict[str, Sequence[Any]]:
        """{split: what ``read`` makes records of}."""
        raise NotImplementedError

    @property
    def read(self) -> Callable[[Tree, Any], Iterator[Record | Bad]]:
        """Makes records of one item; a function that can be pickled."""
        return read_item

    def _dataset_info(self, labels: Sequence[str] | None = None, **kwargs) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "file": tfds.features.Text(),
        }
        if labels is not None:
            features["label"] = tfds.features.ClassLabel(names=list(labels))
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features, **kwargs)

    def _split_generators(self, dl_manager):
        del dl_manager  # Nothing is downloaded: the licences want that users do it themselves.
        make = self._beam_examples if self._beam else self._generate_examples
        return {name: make(name, items) for name, items in self._items.items()}

    def _generate_examples(self, split: str, items: Sequence[Any]) -> Iterator[tuple[str, dict]]:
        results = itertools.chain.from_iterable(self.read(self._tree, item) for item in items)
        good = 0
        check_one = functools.partial(check, needs_captions=self.NEEDS_CAPTIONS)
        for result in _in_threads(check_one, results):
            if isinstance(result, Bad):
                self._bad.append(result)
                self._stop_if_hopeless()
            else:
                good += 1
                yield _example(result)
        if not good:
            raise UserError(f"{self.info.full_name}: no record of the split {split!r} can be used")

    def _beam_examples(self, split: str, items: Sequence[Any]):
        import apache_beam as beam

        read, tree, needs_captions = self.read, self._tree, self.NEEDS_CAPTIONS
        bad_path = os.path.join(self.data_dir, f"bad-{split}")

        def examples(item):
            for result in read(tree, item):
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
        # Taken first: a file that changes meanwhile is noticed when the set is loaded.
        config = self.builder_config.name if self.builder_config else ""
        facts = self.facts(self._tree, config)
        self._items = self.items()
        self._tell_progress_bars()
        try:
            super()._download_and_prepare(dl_manager, download_config)
        except (OSError, UserError):
            raise
        # Beam raises what its workers raised, with where it happened in the message.
        except Exception as error:
            if not self._beam:
                raise
            raise UserError(f"Apache Beam could not prepare {self.name}: {error}") from error
        folder = Path(self.data_dir)
        if self._beam:
            for split in self._items:
                path = folder / f"bad-{split}"
                self._bad += [Bad(**json.loads(line)) for line in path.read_text().splitlines()]
                path.unlink()
        good = sum(split.num_examples for split in self.info.splits.values())
        self._check_share(good)
        source = {"facts": facts, "good": good, "bad": len(self._bad)}
        (folder / SOURCE).write_text(json.dumps(source, indent=2))
        (folder / BAD_RECORDS).write_text(self.bad_records())

    def _tell_progress_bars(self) -> None:
        """TFDS takes the length of its bars from what is known of a set before it is prepared."""
        splits = [
            tfds.core.SplitInfo(name=split, shard_lengths=[len(items)], num_bytes=0)
            for split, items in self._items.items()
            if isinstance(items[0], Item)
        ]
        self.info.set_splits(tfds.core.SplitDict(splits))

    def bad_records(self) -> str:
        """The bad records met so far, as lines of JSON with `file` and `reason`, by name."""
        rows = sorted((bad.file, bad.reason) for bad in self._bad)
        return "".join(json.dumps({"file": f, "reason": r}) + "\n" for f, r in rows)

    def _stop_if_hopeless(self) -> None:
        """Stops early where even all the rest could not bring the share down."""
        if all(isinstance(item, Item) for items in self._items.values() for item in items[:1]):
            self._check_share(sum(map(len, self._items.values())) - len(self._bad))

    def _check_share(self, good: int) -> None:
        if self._bad:
            last = f"; the last one is {self._bad[-1].file} ({self._bad[-1].reason})"
            bad = len(self._bad)
            check_share(self.info.full_name, bad, bad + good, self._max_bad_share, last)
