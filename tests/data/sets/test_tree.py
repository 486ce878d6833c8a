import os
import pickle
import tarfile
import zipfile

import pytest

from vqd_jax import files
from vqd_jax.data.sets.tree import _REFUSED, Tree
from vqd_jax.errors import UserError


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    (folder / "a/b").mkdir(parents=True)
    (folder / "a/one.txt").write_text("one")
    (folder / "a/b/two.txt").write_text("two")
    (folder / ".hidden").write_text("")
    (tmp_path / "secret").write_text("secret")
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        archive.writestr("z/three.txt", "three")
        archive.writestr("a/one.txt", "another one")
        archive.writestr("../escaped.txt", "outside")
    return folder


def test_files_of_folders_and_zips(root):
    tree = Tree(root, ("more.zip", "not_there.zip"))
    assert tree.files("a") == ["a/b/two.txt", "a/one.txt"]
    assert tree.files("a", recursive=False) == ["a/one.txt"]
    assert tree.files("z") == ["z/three.txt"]
    assert tree.folders("a") == ["b"]
    assert tree.has("z") and tree.has("z/three.txt") and tree.has("a/b") and not tree.has("z/t")
    assert tree.read("z/three.txt") == b"three"
    # An unpacked file is preferred to one in a zip.
    assert tree.read("a/one.txt") == b"one"


def test_zips_that_are_not_asked_for_are_files(root):
    tree = Tree(root)
    assert not tree.has("z")
    assert "more.zip" in tree.files()


def test_a_tree_travels_to_workers(root):
    tree = pickle.loads(pickle.dumps(Tree(root, ("more.zip",))))
    assert tree.read("z/three.txt") == b"three"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "a\0", "../root/a"])
def test_names_that_lead_out_are_refused(root, name):
    with pytest.raises(ValueError, match="leads out of the data directory: refused"):
        Tree(root, ("more.zip",)).read(name)
    with pytest.raises(ValueError, match="leads out"):
        Tree(root, ("more.zip",)).read("../escaped.txt")


def test_links_that_lead_out_are_refused(root):
    (root / "out").symlink_to(root.parent / "secret")
    (root / "folder").symlink_to(root.parent)
    (root / "inside").symlink_to("a/one.txt")
    tree = Tree(root)
    for name in ("out", "folder/secret"):
        with pytest.raises(ValueError, match="a symbolic link leads out"):
            tree.read(name)
    with pytest.raises(UserError, match="a symbolic link leads out"):
        tree.files("folder")
    assert tree.read("inside") == b"one"


def test_a_tar_is_neither_followed_out_nor_read_without_a_bound(root):
    member = tarfile.TarInfo("huge.jpg")
    member.size = 10**12
    (root / "huge.tar").write_bytes(member.tobuf())
    assert next(Tree(root).tar("huge.tar")) == ("huge.jpg", None, _REFUSED)
    (root.parent / "outside.tar").write_bytes(member.tobuf())
    (root / "out.tar").symlink_to(root.parent / "outside.tar")
    with pytest.raises(UserError, match="out.tar: a symbolic link leads out"):
        next(Tree(root).tar("out.tar"))


def test_the_directory_itself_may_be_a_link(root):
    link = root.parent / "link"
    link.symlink_to(root)
    assert Tree(link).read("a/one.txt") == b"one"


def test_what_was_looked_for_and_found_is_said(root):
    for number in range(20):
        (root / f"file{number:02d}").write_text("")
    with pytest.raises(UserError) as error:
        Tree(root).first("thing", "this", "that/one")
    message = str(error.value)
    assert f"{root} has no thing: looked for this, that/one; found .hidden, a/, file00" in message
    assert "and 11 more" in message
    empty = root.parent / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="found nothing"):
        Tree(empty).first("thing", "this")


def test_facts_name_contents_and_listings(root):
    tree = Tree(root, ("more.zip",))
    content, zipped = tree.content_fact("a/one.txt"), tree.content_fact("more.zip")
    listing = tree.listing_fact(tree.files("a"))
    sized = tree.listing_fact(tree.files("a") + ["z/three.txt"], sizes=True)
    assert content.startswith("3 bytes, sha256 ")
    assert zipped.startswith("3 members, sha256 ")
    assert listing.startswith("2 files, sha256 ")
    os.utime(root / "a/one.txt", (1, 1))
    assert tree.content_fact("a/one.txt") == content
    (root / "a/one.txt").write_text("longer")
    assert tree.content_fact("a/one.txt") != content
    assert tree.listing_fact(tree.files("a")) == listing
    assert tree.listing_fact(tree.files("a") + ["z/three.txt"], sizes=True) != sized


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"caf\xc3\xa9", "caf\u00e9"),
        (b"\xef\xbb\xbfplain", "plain"),
        (b"caf\xe9", "caf\u00e9"),
        (b"", ""),
    ],
)
def test_text_in_either_encoding(data, text):
    assert files.decode_text(data, "somewhere") == text


def test_a_folder_is_walked_once(root, monkeypatch):
    walked, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: walked.append(path) or scandir(path))
    tree = Tree(root)
    assert tree.files("a") == tree.files("a") == ["a/b/two.txt", "a/one.txt"]
    assert tree.folders("a") == ["b"]
    assert len(walked) == 2
