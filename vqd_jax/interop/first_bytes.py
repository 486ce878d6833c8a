"""What a file is that was given for weights and holds none, by its first bytes."""

import re

_BEGINNINGS = (
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file itself; run `git lfs pull`"),
    (
        rb"\s*(<!doctype html|<html|<head)",
        "a page in HTML, given instead of the file",
    ),
    (rb"\s*(<\?xml|<Error>)", "a page in XML, with which a storage refuses a download"),
    (rb"\s*\{\s*\"", "a text in JSON"),
    (rb"\x1f\x8b", "a gzip archive; unpack it first"),
    (rb"BZh[1-9]", "a bzip2 archive; unpack it first"),
    (rb"\xfd7zXZ\0", "an xz archive; unpack it first"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (rb"Rar!\x1a\x07", "a RAR archive; unpack it first"),
    (rb"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (rb".{257}ustar", "a tar archive; unpack it first"),
    (rb"\x89HDF\r\n", "an HDF5 file, such as Keras writes"),
    (rb"GGUF", "a GGUF file of another program"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb".{8}\{\s*\"", "a safetensors file; its name must end in .safetensors"),
)
# Bytes that `describe` looks at.
LENGTH = 512


def describe(beginning: bytes) -> str:
    """Words for a file that begins so, after "it is "; '' if nothing is known of it."""
    for pattern, words in _BEGINNINGS:
        if re.match(pattern, beginning, re.DOTALL | re.IGNORECASE):
            return words
    return ""
