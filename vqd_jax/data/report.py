"""What a data set looks like: a contact sheet of the training stream, and a page of statistics.

Letters: S image side, L text tokens.
"""

import dataclasses
import hashlib
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from vqd_jax.data import images
from vqd_jax.data.bad_records import CheckedReader
from vqd_jax.data.batches import Crop, choose, code_dataset
from vqd_jax.data.codes import CodesSource
from vqd_jax.data.encode import Codec, Content
from vqd_jax.data.order import shuffled

_TEXT_LINES = 3
# Findings that are listed; the rest are only counted.
_EXAMPLES = 10


class Sample(NamedTuple):
    """A record of the training stream as the model sees it.

    Attributes:
      record: its number in the data set.
      crop: uint8 [S, S, 3].
      reconstruction: from its codes, uint8 [S, S, 3]; None without an autoencoder.
      text: the caption as the tokenizer keeps it, or the label; '' if it was emptied.
    """

    record: int
    crop: np.ndarray
    reconstruction: np.ndarray | None
    text: str


def cached_samples(
    cache: CodesSource,
    source: Sequence[dict],
    codec: Codec,
    crop: Crop,
    content: Content,
    *,
    count: int,
    seed: int,
    null_text_rate: float,
    record_weights: np.ndarray | None = None,
) -> list[Sample]:
    """The first records that training reads from a cache.

    Args:
      cache: of the train split.
      source: the records that were encoded.
      codec: the autoencoder that made the cache.
      crop, content: with which the cache was made.
      count: number of records.
      seed, null_text_rate, record_weights: of the training.
    """
    count = min(count, len(cache))
    dataset = code_dataset(
        cache,
        count,
        seed,
        null_text_rate,
        record_weights=record_weights,
        with_ids=True,
        process_index=0,
        process_count=1,
    )
    batch = next(iter(dataset))
    decoded = np.asarray(codec.decode(batch["codes"]))
    samples = []
    for i, (record, view) in enumerate(zip(batch["id"], batch["crop"], strict=True)):
        pixels = crop(source[int(record)], seed, int(record) * cache.num_crops + int(view))
        if content.tokenizer is not None:
            text = content.tokenizer.decode(batch["text_ids"][i])
        else:
            text = _label_text(batch["label"][i], content) if content.num_classes else ""
        samples.append(Sample(int(record), pixels, decoded[i], text))
    return samples


def source_samples(
    source: Sequence[dict],
    codec: Codec | None,
    crop: Crop,
    num_crops: int,
    content: Content,
    *,
    count: int,
    seed: int,
    null_text_rate: float,
    record_weights: np.ndarray | None = None,
) -> list[Sample]:
    """As ``cached_samples``, before there is a cache. Records that cannot be read are left out.

    Without bad records the two give the same; a cache leaves those out before it is shuffled.
    """
    places = shuffled([len(source)], seed, record_weights=record_weights)
    elements = np.array([places[place] for place in range(min(count, len(source)))])
    choice = choose(elements, [source], seed, null_text_rate)
    read, samples = CheckedReader(source, 1.0, needs_captions=False), []
    for i, row in enumerate(choice.rows.tolist()):
        key = row * num_crops + int(choice.crop[i] * num_crops)
        made = read(row, lambda record, key=key: (record, crop(record, seed, key)))
        if made is not None:
            text = "" if choice.null[i] else _text(made[0], choice.caption[i], content)
            samples.append(Sample(row, made[1], None, text))
    if codec is None or not samples:
        return samples
    crops = np.stack([sample.crop for sample in samples])
    decoded = np.asarray(codec.decode(codec.encode(crops)))
    return [s._replace(reconstruction=d) for s, d in zip(samples, decoded, strict=True)]


def _text(record: dict, number: float, content: Content) -> str:
    if content.tokenizer is not None and len(record["captions"]):
        caption = record["captions"][int(number * len(record["captions"]))]
        return content.tokenizer.decode(content.tokenizer.encode(caption, warn=False))
    return _label_text(record["label"], content) if content.num_classes else ""


def _label_text(label: int, content: Content) -> str:
    return "" if label == content.num_classes else f"class {int(label)}"


def contact_sheet(samples: Sequence[Sample], columns: int = 4) -> Image.Image:
    """The crops, each with its reconstruction on the right and its text below.

    Args:
      samples: at least one, all of the same S.
      columns: number of samples side by side.
    """
    cells = [_cell(sample) for sample in samples]
    return images.tiled([cells[i : i + columns] for i in range(0, len(cells), columns)])


def _cell(sample: Sample) -> Image.Image:
    shown = [sample.crop] if sample.reconstruction is None else [sample.crop, sample.reconstruction]
    picture = np.concatenate([images.enlarge(pixels) for pixels in shown], axis=1)
    height, width, _ = picture.shape
    font = ImageFont.load_default(12)
    characters = max(8, int(width / font.getlength("e")))
    label = f"{sample.record}: {sample.text or '(nothing)'}"
    lines = textwrap.wrap(label, characters, max_lines=_TEXT_LINES, placeholder=" …")
    cell = Image.new("RGB", (width, height + 4 + 15 * _TEXT_LINES), "white")
    cell.paste(Image.fromarray(picture), (0, 0))
    ImageDraw.Draw(cell).multiline_text((0, height + 2), "\n".join(lines), "black", font, spacing=2)
    return cell


@dataclasses.dataclass
class Statistics:
    """What was found in a split.

    Attributes:
      num_records: records of the split.
      inspected: records that were read.
      bad: {record: why it is bad}.
      widths, heights: of the images, in pixels.
      modes: numbers of the stored colour modes.
      captions: number of captions of each record.
      caption_ids: number of ids of each caption, before it is cut.
      labels: number of records of each class.
      images: {hash of an image: its records}.
      texts: {cleaned caption: its records}.
    """

    num_records: int
    inspected: int
    bad: dict[int, str] = dataclasses.field(default_factory=dict)
    widths: list[int] = dataclasses.field(default_factory=list)
    heights: list[int] = dataclasses.field(default_factory=list)
    modes: Counter = dataclasses.field(default_factory=Counter)
    captions: list[int] = dataclasses.field(default_factory=list)
    caption_ids: list[int] = dataclasses.field(default_factory=list)
    labels: Counter = dataclasses.field(default_factory=Counter)
    images: dict[bytes, list[int]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    texts: dict[str, list[int]] = dataclasses.field(default_factory=lambda: defaultdict(list))


def statistics(
    source: Sequence[dict],
    content: Content,
    *,
    description: str = "inspecting",
    max_records: int = 20_000,
    num_threads: int = 4,
) -> Statistics:
    """Reads the records of a split, or of some that are spread evenly over it, and their images.

    Args:
      source: random-access records with the bytes of their ``image``.
      content: its tokenizer measures captions.
      description: of the progress bar.
      max_records: how many records are read at most.
      num_threads: threads that read and decode.

    Raises:
      OSError: the system cannot read a record.
    """
    count = min(max_records, len(source))
    rows = np.arange(count) * len(source) // max(count, 1)
    found = Statistics(len(source), count)
    read = CheckedReader(source, 1.0, needs_captions=content.tokenizer is not None)

    def facts(row):
        return read(int(row), lambda record: (int(row), _facts(record, content)))

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=64)
    stream = grain.MapDataset.source(rows).map(facts).to_iter_dataset(options, allow_nones=True)
    for known in tqdm(stream, description, total=count, unit="image", mininterval=1):
        if known is not None:
            _add(found, *known)
    found.bad = dict(sorted(read.bad.items()))
    return found


def _facts(record: dict, content: Content) -> dict:
    data, tokenizer = record["image"], content.tokenizer
    captions = list(record.get("captions", ()))
    return {
        "shape": images.decode(data).shape,
        "mode": images.colour_mode(data),
        "captions": captions,
        "ids": [tokenizer.num_ids(c) for c in captions] if tokenizer else [],
        "label": record.get("label"),
        "hash": hashlib.sha256(data).digest()[:16],
    }


def _add(found: Statistics, row: int, facts: dict) -> None:
    height, width, _ = facts["shape"]
    found.widths.append(width)
    found.heights.append(height)
    found.modes[facts["mode"]] += 1
    found.captions.append(len(facts["captions"]))
    found.caption_ids.extend(facts["ids"])
    if facts["label"] is not None:
        found.labels[int(facts["label"])] += 1
    found.images[facts["hash"]].append(row)
    # A record that says the same thing twice is no duplicate of another record.
    for text in {" ".join(caption.lower().split()) for caption in facts["captions"]}:
        found.texts[text].append(row)


def page(title: str, splits: Mapping[str, Statistics], content: Content) -> str:
    """The statistics as Markdown.

    Args:
      title: heading of the page.
      splits: {name: what ``statistics`` found}.
      content: that ``statistics`` was given.
    """
    lines = [f"# {title}", ""]
    for name, found in splits.items():
        lines += [f"## {name}", "", *_split_lines(found, content), ""]
    lines += ["## The same in two splits", "", *_leaks(splits)]
    return "\n".join(lines) + "\n"


def _split_lines(found: Statistics, content: Content) -> Iterator[str]:
    read = "all" if found.inspected == found.num_records else f"{found.inspected:,} spread evenly"
    yield f"- records: {found.num_records:,} ({read} read)"
    share = _share(len(found.bad), found.inspected)
    yield f"- bad records in the prepared set: {len(found.bad):,} ({share})"
    for row, reason in list(found.bad.items())[:_EXAMPLES]:
        yield f"  - record {row}: {reason}"
    if not found.widths:
        return
    yield f"- width: {_spread(found.widths)} pixels"
    yield f"- height: {_spread(found.heights)} pixels"
    ratios = [f"{w / h:.2f}" for w, h in zip(found.widths, found.heights, strict=True)]
    common = Counter(ratios).most_common(3)
    yield "- width / height: " + ", ".join(f"{r} ({_share(n, len(ratios))})" for r, n in common)
    yield "- colour modes: " + ", ".join(f"{m} {n:,}" for m, n in found.modes.most_common())
    if found.labels:
        yield f"- classes: {len(found.labels):,}, with {_spread(found.labels.values())} records"
    if content.tokenizer is not None:
        limit = content.tokenizer.context_length
        cut = sum(n > limit for n in found.caption_ids)
        yield f"- captions of a record: {_spread(found.captions)}"
        yield f"- ids of a caption: {_spread(found.caption_ids)}"
        yield (
            f"- captions cut to {limit} ids: {cut:,} of {len(found.caption_ids):,} "
            f"({_share(cut, len(found.caption_ids))})"
        )
    for what, groups in (("images", found.images), ("captions", found.texts)):
        same = {key: rows for key, rows in groups.items() if len(rows) > 1}
        if what == "captions" and content.tokenizer is None:
            continue
        yield f"- {what} that several records have: {len(same):,}"
        largest = sorted(same.items(), key=lambda item: -len(item[1]))[:_EXAMPLES]
        for key, rows in largest:
            shown = f"{key!r}: " if what == "captions" else ""
            more = " …" if len(rows) > _EXAMPLES else ""
            yield f"  - {shown}records {', '.join(map(str, rows[:_EXAMPLES]))}{more}"


def _leaks(splits: Mapping[str, Statistics]) -> Iterator[str]:
    names = list(splits)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    if not pairs:
        yield "There is one split."
    for a, b in pairs:
        same = splits[a].images.keys() & splits[b].images.keys()
        texts = splits[a].texts.keys() & splits[b].texts.keys()
        yield f"- {a} and {b}: {len(same):,} images, {len(texts):,} captions"
        for key in sorted(same)[:_EXAMPLES]:
            yield f"  - record {splits[a].images[key][0]} is record {splits[b].images[key][0]}"


def _spread(values) -> str:
    low, middle, high = np.percentile(list(values), [0, 50, 100])
    return f"{low:g} to {high:g}, median {middle:g}"


def _share(count: int, total: int) -> str:
    return f"{count / total:.2%}" if total else "-"
