"""What there is to see in a data set: a contact sheet of the training stream, and a page of counts.

Letters: S image side, L text tokens.
"""

import collections
import hashlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from vqd_jax.data import images
from vqd_jax.data.batches import Crop, choose, code_dataset
from vqd_jax.data.codes import CodesSource
from vqd_jax.data.encode import Codec, Content
from vqd_jax.data.order import shuffled

_TEXT_LINES = 3
# Shown of a list of findings; all of them are counted.
_EXAMPLES = 10


class Sample(NamedTuple):
    """A record of the training stream as the model sees it.

    Attributes:
      record: its number in the data set.
      crop: uint8 [S, S, 3].
      reconstruction: from its codes, uint8 [S, S, 3]; None without an autoencoder.
      text: the caption as the tokenizer keeps it, or the label; '' where it is emptied.
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
) -> list[Sample]:
    """The first records of the stream that a cache gives to training.

    Args:
      cache: of the train split.
      source: the records that were encoded.
      codec: the autoencoder that made the cache.
      crop: of the cache.
      content: of the cache.
      count: records.
      seed, null_text_rate: of the training.
    """
    count = min(count, len(cache))
    dataset = code_dataset(
        cache, count, seed, null_text_rate, with_ids=True, process_index=0, process_count=1
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
) -> list[Sample]:
    """As ``cached_samples`` before there is a cache; records that cannot be read are left out.

    Without bad records it is the same stream: a cache leaves those out before it is shuffled.
    """
    places = shuffled([len(source)], seed)
    elements = np.array([places[place] for place in range(min(count, len(source)))])
    choice = choose(elements, [source], seed, null_text_rate)
    samples = []
    for i, row in enumerate(choice.rows.tolist()):
        try:
            record = source[row]
            pixels = crop(record, seed, row * num_crops + int(choice.crop[i] * num_crops))
        except Exception:  # The page of statistics names it.
            continue
        text = "" if choice.null[i] else _text(record, choice.caption[i], content)
        samples.append(Sample(row, pixels, None, text))
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
    """Crops, each with its reconstruction on the right and its text below.

    Args:
      samples: at least one; all of the same S.
      columns: samples side by side.
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


class Statistics(NamedTuple):
    """Counts of a split.

    Attributes:
      num_records: records of the split.
      inspected: records that were read.
      bad: record -> why it cannot be read.
      widths, heights: of the images, pixels.
      modes: stored colour modes.
      captions: captions of each record.
      caption_ids: ids of each caption before any cut.
      labels: records of each class.
      images: hash of an image -> records.
      texts: cleaned caption -> records.
    """

    num_records: int
    inspected: int
    bad: dict[int, str]
    widths: list[int]
    heights: list[int]
    modes: collections.Counter
    captions: list[int]
    caption_ids: list[int]
    labels: collections.Counter
    images: dict[bytes, list[int]]
    texts: dict[str, list[int]]


def statistics(
    source: Sequence[dict],
    content: Content,
    *,
    description: str = "inspecting",
    max_records: int = 20_000,
    num_threads: int = 4,
) -> Statistics:
    """Reads a split, or so many records spread evenly over it, decoding every image.

    Args:
      source: random-access records with the bytes of their ``image``.
      content: its tokenizer measures captions.
      description: of the progress bar.
      max_records: records that are read.
      num_threads: threads that read and decode.
    """
    count = min(max_records, len(source))
    rows = np.arange(count) * len(source) // max(count, 1)
    found = Statistics(
        len(source), count, {}, [], [], collections.Counter(), [], [], collections.Counter(),
        collections.defaultdict(list), collections.defaultdict(list),
    )  # fmt: skip
    look = lambda row: (int(row), *_look(source, int(row), content))  # noqa: E731
    stream = grain.MapDataset.source(rows).map(look)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=64)
    bar = tqdm(total=count, desc=description, unit="image", mininterval=1)
    with bar:
        for row, facts, problem in stream.to_iter_dataset(options):
            bar.update()
            if problem:
                found.bad[row] = problem
            else:
                _add(found, row, facts)
    return found


def _look(source: Sequence[dict], row: int, content: Content) -> tuple[dict, str]:
    try:
        record = source[row]
        data = record["image"]
        height, width, _ = images.decode(data).shape
        captions = list(record.get("captions", ()))
        if content.tokenizer is not None and not (captions and all(c.strip() for c in captions)):
            raise ValueError("empty caption")
        tokenizer = content.tokenizer
        return {
            "size": (width, height),
            "mode": images.colour_mode(data),
            "captions": captions,
            "ids": [tokenizer.num_ids(c) for c in captions] if tokenizer else [],
            "label": record.get("label"),
            "hash": hashlib.sha256(data).digest()[:16],
        }, ""
    except Exception as error:
        return {}, f"{type(error).__name__}: {error}"


def _add(found: Statistics, row: int, facts: dict) -> None:
    width, height = facts["size"]
    found.widths.append(width)
    found.heights.append(height)
    found.modes[facts["mode"]] += 1
    found.captions.append(len(facts["captions"]))
    found.caption_ids.extend(facts["ids"])
    if facts["label"] is not None:
        found.labels[int(facts["label"])] += 1
    found.images[facts["hash"]].append(row)
    # A record that says the same twice is no duplicate of another one.
    for text in {" ".join(caption.lower().split()) for caption in facts["captions"]}:
        found.texts[text].append(row)


def page(title: str, splits: Mapping[str, Statistics], content: Content) -> str:
    """The counts as Markdown.

    Args:
      title: heading.
      splits: name -> what ``statistics`` found.
      content: as given to ``statistics``.
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
    common = collections.Counter(ratios).most_common(3)
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
