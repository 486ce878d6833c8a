"""How tokens and pictures travel between the server and a browser: as text, never as a file.

Letters: N image tokens, K codes, S image side, F frames, C candidates of a token.
"""

import base64
import binascii
import io
import math

import numpy as np
from PIL import Image

from vqd_jax.data import images
from vqd_jax.errors import UserError

# A picture that a visitor sends: bytes of its file, and pixels of it.
MAX_BYTES = 12_000_000
MAX_PIXELS = 24_000_000
# Codes travel as 16 bits each.
MAX_CODES = 2**16 - 1
# Larger pictures are sent as WebP with a loss that nobody sees, smaller ones exactly.
_EXACT_SIDE = 96


def pack(codes: np.ndarray) -> str:
    """Codes or mask tokens, any shape, as base64url of little-endian 16-bit numbers."""
    return base64.urlsafe_b64encode(np.asarray(codes, "<u2").tobytes()).decode().rstrip("=")


def unpack(text: str, count: int, bound: int, name: str) -> np.ndarray:
    """int32 [count] of what ``pack`` made.

    Raises:
      UserError: there are other than ``count`` numbers, or one is ``bound`` or more; the message
        begins with ``name``.
    """
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        codes = np.frombuffer(data, "<u2").astype(np.int32)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name}: is no list of codes in base64url") from error
    if len(codes) != count or codes.max() >= bound:
        raise UserError(f"{name}: must be {count} numbers below {bound}, 16 bits each")
    return codes


def pack_shares(shares: np.ndarray) -> str:
    """Numbers in 0..1, any shape, as base64url of bytes: 255 is 1."""
    return base64.urlsafe_b64encode(np.rint(255 * np.asarray(shares)).astype(np.uint8)).decode()


def picture_url(pixels: np.ndarray) -> str:
    """A data URL of uint8 [H, W, 3]."""
    exact = min(pixels.shape[:2]) <= _EXACT_SIDE
    options = {"format": "PNG"} if exact else {"format": "WEBP", "quality": 92}
    return _url(Image.fromarray(pixels), **options)


def png_url(pixels: np.ndarray) -> str:
    """A data URL of uint8 [H, W, 3] that keeps every pixel."""
    return _url(Image.fromarray(pixels), format="PNG")


def sheet_url(frames: np.ndarray) -> tuple[str, int]:
    """A data URL of pictures uint8 [F, S, S, 3] in rows, and how many stand in a row."""
    columns = math.ceil(math.sqrt(len(frames)))
    side = frames.shape[1]
    rows = -(-len(frames) // columns)
    sheet = np.zeros((rows * columns, *frames.shape[1:]), np.uint8)
    sheet[: len(frames)] = frames
    sheet = sheet.reshape(rows, columns, side, side, 3).swapaxes(1, 2)
    sheet = sheet.reshape(rows * side, columns * side, 3)
    exact = side <= _EXACT_SIDE
    options = {"format": "PNG"} if exact else {"format": "WEBP", "quality": 88}
    return _url(Image.fromarray(sheet), **options), columns


def animation_url(frames: list[Image.Image]) -> str:
    """A data URL of a GIF; see ``images.animation``."""
    return _data_url("gif", images.animation(frames))


def read_picture(url: str) -> Image.Image:
    """The picture in a data URL, upright and in RGB.

    Raises:
      UserError: it is too large, or no picture that can be read.
    """
    if not isinstance(url, str) or not url.startswith("data:") or ";base64," not in url[:100]:
        raise UserError("picture: must be a data URL, data:image/png;base64,...")
    if len(url) > MAX_BYTES * 4 // 3 + 100:
        raise UserError(f"picture: the file is larger than {MAX_BYTES // 1_000_000} MB")
    try:
        data = base64.b64decode(url.split(";base64,", 1)[1], validate=True)
        return Image.fromarray(images.decode(data, max_pixels=MAX_PIXELS))
    except ValueError as error:
        raise UserError(f"picture: cannot be read: {error}") from error


def _url(image: Image.Image, **options) -> str:
    file = io.BytesIO()
    if options["format"] == "PNG":
        # Faster than the default, for files that are a little larger.
        options["compress_level"] = 1
    image.save(file, **options)
    return _data_url(options["format"].lower(), file.getvalue())


def _data_url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
