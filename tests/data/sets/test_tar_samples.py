import io
import json
import tarfile
import unicodedata

import pytest
from PIL import Image

from vqd_jax.data.sets import tar_samples
from vqd_jax.data.sets.file_set import Bad, Record
from vqd_jax.data.sets.tree import Tree
from vqd_jax.errors import UserError


def png():
    data = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(data, "PNG")
    return data.getvalue()


PNG = png()


@pytest.fixture
def read(tmp_path):
    """read([(name, bytes), ...]) -> {file: captions} of records, {file: reason} of the others."""

    def read(members, damage=lambda data: data):
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, data in members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        path.write_bytes(damage(path.read_bytes()))
        results = list(tar_samples.read(Tree(tmp_path), "a.tar"))
        records = {r.file.removeprefix("a.tar/"): r for r in results if isinstance(r, Record)}
        bad = {r.file.removeprefix("a.tar/"): r for r in results if isinstance(r, Bad)}
        assert len(records) + len(bad) == len(results)
        return {file: r.captions for file, r in records.items()}, bad

    return read


def sample(stem, text=None):
    return [(f"{stem}.png", PNG), (f"{stem}.txt", (text or stem).encode())]


def test_names_with_dots_are_samples_of_their_own(read):
    stems = ["00", "photo v0.4 final", "photo v0.5 final", "a.b/cat", "a.b/cat.2"]
    found, bad = read([member for stem in stems for member in sample(stem)])
    assert found == {f"{stem}.png": [stem] for stem in stems}
    assert not bad
    # All pictures first, as some programs write them.
    apart = sorted(sample("photo v0.4 final") + sample("photo v0.5 final"))
    by_kind = sorted(apart, key=lambda member: member[0].endswith("txt"))
    assert len(read(by_kind)[0]) == 2


def test_parts_with_longer_names_belong_to_their_sample(read):
    found, bad = read(
        [
            ("0.jpg", PNG), ("0.json", json.dumps({"caption": "no"}).encode()), ("0.txt", b"zero"),
            ("0.seg.png", PNG), ("0.cls", b"3"),
            ("1.seg.png", PNG), ("1.txt", b"one"),
            ("2.png", PNG), ("2.caption.txt", b"two"),
        ]
    )  # fmt: skip
    assert found == {"0.jpg": ["zero"], "1.seg.png": ["one"], "2.png": ["two"]}
    assert {name: b.counts for name, b in bad.items()} == {"0.seg.png": False}


def test_pictures_are_known_by_their_content(read):
    found, bad = read(
        [("0.picture", PNG), ("0.txt", b"a"), ("1.heic", b"????ftypheic"), ("1.txt", b"b")]
    )
    assert found == {"0.picture": ["a"]}
    assert bad["1"].reason == "no picture that this program reads: 1.heic" and bad["1"].counts


def test_what_is_no_sample_is_named_but_is_no_bad_record(read):
    found, bad = read([*sample("0"), ("README.md", b"hello"), ("LICENSE", b"mine")])
    assert set(found) == {"0.png"}
    assert {name: (b.reason, b.counts) for name, b in bad.items()} == {
        "README.md": ("neither a picture nor a text", False),
        "LICENSE": ("neither a picture nor a text", False),
    }


def test_a_damaged_header_costs_its_member_alone(read):
    stems = [f"{n:02d}" for n in range(6)]
    members = [member for stem in stems for member in sample(stem)]

    def damage(data):
        at = data.index(b"03.png")
        return data[:at] + b"\xff" + data[at + 1 :]

    found, bad = read(members, damage)
    assert found == {f"{stem}.png": [stem] for stem in stems if stem != "03"}
    assert [b.reason for b in bad.values()] == [
        "damaged: the header of a member is missing",
        "a text without an image",
    ]


def test_tars_that_were_joined_and_names_of_other_letters(read):
    odd = b"caf\xe9".decode("utf-8", "surrogateescape")
    found, bad = read(sample("0") + sample("long " * 30) + sample(odd, "text"), lambda d: d + d)
    assert set(found) == {"0.png", f"{'long ' * 30}.png", f"{odd}.png"}
    assert {b.reason for b in bad.values()} == {"an earlier sample of this tar has the same key"}


def test_two_spellings_of_a_name_are_one_sample(read):
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    members = [(f"{apart}.png", PNG), (f"{composed}.txt", b"a cup"), ("./0.png", PNG)]
    found, bad = read([*members, ("0.txt", b"zero"), *sample("1"), *sample("0")])
    assert found == {f"{apart}.png": ["a cup"], "./0.png": ["zero"], "1.png": ["1"]}
    assert {name: b.reason for name, b in bad.items()} == {
        "0.png": "an earlier sample of this tar has the same key"
    }


def test_what_is_no_tar_is_named(read):
    with pytest.raises(UserError, match="a.tar cannot be read: "):
        read([], lambda data: b"<html>" * 1000)
