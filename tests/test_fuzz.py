"""Random damage to everything that is read: pictures, tars, tables, JSON, checkpoints, prompts.

What was damaged is a named bad record or still right, what was not damaged survives, and a file
that cannot be used is a `UserError` that names it. 25 damages of each kind are in the suite, 500 in

    python -m pytest -m slow tests/test_fuzz.py
"""

import csv
import io
import json
import pathlib
import tarfile
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from vqd_jax import modes
from vqd_jax.data import images, sets
from vqd_jax.data.sets import coco_text, metadata, tar_samples
from vqd_jax.data.sets.file_set import Bad, Item, Record, check
from vqd_jax.data.sets.tree import Tree
from vqd_jax.errors import UserError
from vqd_jax.interop import tensors, torch_file

GOLDEN = pathlib.Path(__file__).parent / "golden"
many = pytest.mark.parametrize("examples", [25, pytest.param(500, marks=pytest.mark.slow)])


class Edit:
    """Bytes ``start`` to ``end`` replaced by others; in-place if the length stays."""

    def __init__(self, start, end, new):
        self.start, self.end, self.new = start, end, new
        self.in_place = len(new) == end - start

    def __repr__(self):
        return f"[{self.start}:{self.end}] = {self.new!r}"

    def apply(self, data):
        return data[: self.start] + self.new + data[self.end :]

    def touches(self, start, end):
        """Whether bytes of this range are others now, or stand elsewhere."""
        return self.start < end and (not self.in_place or self.end > start)


@st.composite
def edits(draw, size):
    start = draw(st.integers(0, max(size - 1, 0)))
    kind = draw(st.sampled_from(["write", "write", "write", "remove", "insert", "cut"]))
    some = st.one_of(
        st.binary(min_size=1, max_size=6), st.sampled_from([b'"', b"\n", b"\0", b"{}"])
    )
    if kind == "cut":
        return Edit(start, size, b"")
    new = draw(some)
    if kind == "remove":
        return Edit(start, min(start + len(new), size), b"")
    if kind == "insert":
        return Edit(start, start, new)
    return Edit(start, min(start + len(new), size), new[: max(size - start, 0)])


def fuzz(examples, data, body):
    """Calls ``body`` with so many damages of ``data``."""

    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(edits(len(data)))
    def run(edit):
        hypothesis.assume(edit.apply(data) != data)
        body(edit, edit.apply(data))

    run()


def names_the_cause(error, path):
    """Whether a message has the file and more than the kind of an exception."""
    message = str(error)
    return str(path) in message and len(message.replace(str(path), "")) > 10


def picture(seed, format="PNG", size=(12, 9)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format)
    return data.getvalue()


@many
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_pictures(examples, format):
    data = picture(0, format, (24, 17))
    right = images.decode(data)

    def body(edit, damaged):
        try:
            found = images.decode(damaged)
        except ValueError as error:
            assert len(str(error)) > 5
            return
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[-1] == 3
        if format == "PNG":
            # The other formats have no checksums.
            np.testing.assert_array_equal(found, right)

    fuzz(examples, data, body)


@many
def test_tars(examples, tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(6):
            name = f"caf\u00e9 {number}" if number == 2 else f"{number:03d}"
            for suffix, content in (("png", picture(number)), ("txt", f"text {number}".encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        members = list(tar)
    # From the first header of a sample to the end of its last member.
    places = {
        f"a.tar/{first.name}": (first.offset, -(-(last.offset_data + last.size) // 512) * 512)
        for first, last in zip(members[::2], members[1::2], strict=True)
    }
    right = {record.file: record for record in tar_samples.read(Tree(tmp_path), "a.tar")}
    assert right.keys() == places.keys()

    def body(edit, damaged):
        path.write_bytes(damaged)
        tree = Tree(tmp_path)
        try:
            tree.check_tar("a.tar")
            results = [check(r, True) for r in tar_samples.read(tree, "a.tar")]
        except UserError as error:
            assert names_the_cause(error, path)
            # What stays in its place is found.
            assert not edit.in_place or edit.end > len(data) - 10240 or b"\0" in edit.new, edit
            return
        found = {r.file: r for r in results if isinstance(r, Record)}
        assert all(r.reason for r in results if isinstance(r, Bad))
        for file, (start, end) in places.items():
            if not edit.touches(start, end):
                assert found[file] == right[file], edit
            elif file in found:
                assert found[file].image == right[file].image or zlib.crc32(found[file].image)

    fuzz(examples, data, body)


CAPTIONS = [
    "a fox",
    'with "marks"',
    "one; two, three",
    "caf\u00e9 \u4e2d",
    "two\u2028parts",
    "last",
]


def tables():
    rows = [{"file_name": f"{n}.png", "text": text} for n, text in enumerate(CAPTIONS)]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["file_name", "text"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return {"metadata.csv": text.getvalue().encode(), "metadata.jsonl": lines.encode()}


def lines_of(data):
    """(start, end) of every line with its end."""
    starts = [0, *(place + 1 for place, byte in enumerate(data) if byte == ord("\n"))]
    return list(zip(starts, starts[1:], strict=False))


@many
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_tables(examples, name, tmp_path):
    data = tables()[name]
    names = [f"{n}.png" for n in range(len(CAPTIONS))]
    places = dict(zip(names, lines_of(data)[-len(names) :], strict=True))

    def body(edit, damaged):
        (tmp_path / name).write_bytes(damaged)
        try:
            items = metadata.items(Tree(tmp_path), [name], names)
        except UserError as error:
            assert names_the_cause(error, tmp_path / name)
            # The header, or a beginning that looks like another encoding.
            assert edit.start < max(lines_of(data)[0][1], 4) or edit.end == len(data), edit
            return
        assert all(isinstance(item, Item) for item in items)
        found = {item.file: item for item in items if not item.problem}
        for number, (file, (start, end)) in enumerate(places.items()):
            # Rows stand on lines of their own, so those after an insertion stay what they are.
            moved = edit.end < start
            kept = moved or edit.start >= end
            if kept and edit.start >= 4 and not (edit.start < lines_of(data)[0][1] < start):
                assert CAPTIONS[number] in found[file].captions, edit

    fuzz(examples, data, body)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 99), st.text(max_size=4), st.just([]), st.just({}),
    st.just("half \ud83c"), st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip


def annotations():
    pictures = [{"id": 10 + n, "file_name": f"{n}.jpg"} for n in range(5)]
    notes = [{"id": 100 + n, "image_id": 10 + n % 5, "caption": f"caption {n}"} for n in range(10)]
    return {"images": pictures, "annotations": notes}


def coco(tmp_path):
    for phase in ("train", "val"):
        (tmp_path / f"{phase}2014").mkdir()
    (tmp_path / "annotations").mkdir()
    return tmp_path / "annotations/captions_train2014.json"


@many
def test_values_of_coco_json(examples, tmp_path):
    path = coco(tmp_path)

    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(st.data())
    def run(data):
        content = annotations()
        part = data.draw(st.sampled_from(["images", "annotations"]))
        row = data.draw(st.integers(0, len(content[part]) - 1))
        key = data.draw(st.sampled_from([None, *content[part][row]]))
        if key is None:
            content[part][row] = data.draw(JUNK)
        else:
            content[part][row][key] = data.draw(JUNK)
        path.write_text(json.dumps(content))
        items = coco_text._read_phase(Tree(tmp_path), "train")
        found = {item.file: item.captions for item in items if not item.problem}
        assert all(item.problem != "" or item.file for item in items)
        touched = row if part == "images" else row % 5
        for n in range(5):
            if n != touched:
                assert {f"caption {n}", f"caption {n + 5}"} <= set(found[f"train2014/{n}.jpg"])

    run()


@many
def test_bytes_of_coco_json(examples, tmp_path):
    path = coco(tmp_path)

    def body(edit, damaged):
        path.write_bytes(damaged)
        try:
            items = coco_text._read_phase(Tree(tmp_path), "train")
            assert all(isinstance(item, Item) for item in items)
        except UserError as error:
            assert names_the_cause(error, path)

    fuzz(examples, json.dumps(annotations()).encode(), body)


def checkpoints(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {"one": np.arange(6, dtype=np.float32).reshape(2, 3), "two": np.zeros(3, np.float16)}
    tensors.write_safetensors(path, arrays, {name: x.dtype for name, x in arrays.items()})
    mapping = (GOLDEN / "class_model_mapping.pt").read_bytes()
    return {path.name: path.read_bytes(), "a.pt": mapping}


@many
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_checkpoints(examples, name, tmp_path):
    data = checkpoints(tmp_path)[name]
    path = tmp_path / name

    def body(edit, damaged):
        path.write_bytes(damaged)
        try:
            if name == "a.pt":
                loaded = torch_file.load(path)
                if isinstance(loaded, tensors.Tensor):
                    np.asarray(loaded)
            else:
                for tensor in tensors.read_safetensors(path).values():
                    np.asarray(tensor)
        except UserError as error:
            assert names_the_cause(error, path)

    fuzz(examples, data, body)


@many
def test_prompt_files(examples, tmp_path):
    prompts = ["red heart", "caf\u00e9 \u4e2d", "a \U0001f600 face", "last"]
    data = "".join(f"{prompt}\n" for prompt in prompts).encode()
    path = tmp_path / "prompts.txt"

    def body(edit, damaged):
        path.write_bytes(damaged)
        try:
            found = modes.read_prompts(str(path))
        except UserError as error:
            assert names_the_cause(error, path)
            assert b"\0" in damaged or not damaged.strip()
            return
        "".join(found).encode("utf-8")
        assert all(prompt == prompt.strip() and prompt for prompt in found)
        for prompt, (start, end) in zip(prompts, lines_of(data), strict=True):
            if edit.start >= max(end, 4) or (edit.end < start and edit.start >= 4):
                assert any(prompt in line for line in found), edit

    fuzz(examples, data, body)


@pytest.mark.parametrize("examples", [5, pytest.param(500, marks=pytest.mark.slow)])
def test_whole_sets(examples, tmp_path):
    """One of the pictures or texts of a set is damaged; the others are records as before."""
    source, prepared = tmp_path / "source", tmp_path / "prepared"
    source.mkdir()
    for number in range(5):
        (source / f"{number}.png").write_bytes(picture(number))
        (source / f"{number}.txt").write_bytes(f"text {number}".encode())
    contents = {path.name: path.read_bytes() for path in source.iterdir()}

    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(st.data())
    def run(data):
        name = data.draw(st.sampled_from(sorted(contents)))
        edit = data.draw(edits(len(contents[name])))
        (source / name).write_bytes(edit.apply(contents[name]))
        home = prepared / str(len(list(prepared.glob("*"))))
        builder = sets.load("image_text_folder", str(source), str(home), max_bad_share=0.5)
        (source / name).write_bytes(contents[name])
        files = {
            record["file"].decode()
            for split in builder.info.splits
            for record in builder.as_data_source(split)
        }
        bad = {entry["file"] for entry in sets.bad_records(builder)}
        damaged = name.replace(".txt", ".png")
        assert files | bad == {f"{n}.png" for n in range(5)}
        assert bad <= {damaged}
        assert not list(home.rglob("incomplete.*"))

    run()
