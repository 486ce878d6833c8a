"""What surrounds the pixels of an encoded picture: colour profiles, texts, checksums.

None of it ever costs a picture, and none of it changes what is seen: a picture with a profile is
shown in sRGB, as a browser shows it.
"""

import functools
import io
import zlib
from collections.abc import Iterator

from PIL import Image, ImageCms

_PNG = b"\x89PNG\r\n\x1a\n"
# Besides what is needed for the pixels: transparency, profile, orientation.
_KEPT = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"iCCP", b"eXIf")
_NEEDED = (b"IHDR", b"PLTE", b"IDAT")
# Segments of a JPEG: JFIF and Adobe's say how colours are stored, all others are about the picture.
_APPLICATION, _COMMENT = range(0xE0, 0xF0), 0xFE
_ABOUT_COLOURS = (0xE0, 0xEE)
_SCAN = 0xDA
# The colour space that a profile must have, for each mode of Pillow.
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}


def require_sound(data: bytes) -> None:
    """Raises ``ValueError`` if a PNG has wrong checksums where its pixels are.

    Pillow would show what the damage made of them.
    """
    for kind, content, is_right in _chunks(data):
        if kind in _NEEDED and not is_right:
            raise ValueError(f"the checksum of {kind.decode()} is wrong ({len(content)} bytes)")


def bare(data: bytes) -> bytes | None:
    """The pixels of a PNG or JPEG without what may be damaged beside them; None of other data."""
    if data.startswith(_PNG):
        kept = [
            len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)
            for kind, content, is_right in _chunks(data)
            if kind in _NEEDED or (kind in _KEPT and is_right)
        ]
        return _PNG + b"".join(kept)
    if data.startswith(b"\xff\xd8\xff"):
        return _bare_jpeg(data)
    return None


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """(kind, content, whether the checksum is right) of the whole chunks of a PNG."""
    place = len(_PNG) if data.startswith(_PNG) else len(data)
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4])
        end = place + 12 + length
        if end > len(data):
            return
        kind, content = data[place + 4 : place + 8], data[place + 8 : end - 4]
        checksum = int.from_bytes(data[end - 4 : end])
        yield kind, content, zlib.crc32(kind + content) == checksum
        if kind == b"IEND":
            return
        place = end


def _bare_jpeg(data: bytes) -> bytes | None:
    kept, place = [data[:2]], 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        kind, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if kind == _SCAN:
            return b"".join(kept) + data[place:]
        is_extra = kind == _COMMENT or (kind in _APPLICATION and kind not in _ABOUT_COLOURS)
        if not is_extra:
            kept.append(data[place : place + 2 + length])
        place += 2 + length
    return None


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """``image`` (mode RGB, L or CMYK) in RGB, its colours as ``profile`` means them.

    A profile that is damaged, that of sRGB, or of another kind of colours changes nothing.
    """
    transform = _transform(profile, image.mode) if profile else None
    if transform is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    return ImageCms.applyTransform(image, transform)


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        described = source.profile.profile_description or ""
        if source.profile.xcolor_space.strip() != _SPACES[mode] or "srgb" in described.lower():
            return None
        return ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            # Several threads share it.
            flags=ImageCms.Flags.NOCACHE | ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    # Pillow has an error of its own, and passes on those of damaged profiles.
    except Exception:
        return None
