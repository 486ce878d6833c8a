"""What the engine runs on the model: samplings of several requests, and short questions.

Letters: R rows of a batch, J images of a request, N image tokens, S image side, F steps, K codes,
C candidates of a token.
"""

import dataclasses
import functools
import math
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vqd_jax.data import images, masks
from vqd_jax.errors import UserError
from vqd_jax.generation import Preview
from vqd_jax.parallel import rows as rows_lib
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.web import form as form_lib
from vqd_jax.web import wire
from vqd_jax.web.engine import Engine
from vqd_jax.web.form import Request

# Rows of the compiled programs; a batch is filled up to the next of them.
ROWS = sorted(rows_lib.sizes(form_lib.MAX_PICTURES))
# Steps between two previews; a cancel takes effect after so many at the latest.
EVERY = 5
# Seconds between two previews of one sampling. More often nobody sees, and to decode and send one
# costs as much as some steps of a small network.
PAUSE = 0.25
# Times of the schedule that a likelihood visits.
NUM_DRAWS = 20
# Of ``Preview.candidates``.
NUM_CANDIDATES = 5


class Part(NamedTuple):
    """Where a request is.

    Attributes:
      done, total: steps.
      tokens: int32 [J, N]; K is the mask.
      pixels: uint8 [J, S, S, 3]; where the mask is, the likeliest code is decoded.
      candidates: int32 [J, N, C], the likeliest codes, the best first.
      probabilities: float32 [J, N, C], theirs.
      confidence: float32 [J, N], the probability of the code that is there.
      trajectory: int32 [F, J, N], the tokens after every step, when all are done; else None.
    """

    done: int
    total: int
    tokens: np.ndarray
    pixels: np.ndarray
    candidates: np.ndarray
    probabilities: np.ndarray
    confidence: np.ndarray
    trajectory: np.ndarray | None


def engine(model: VQDiffusion) -> Engine:
    """The queue in front of a model."""
    return Engine(lambda requests: sampling(model, requests), _key, _kind, max_rows=ROWS[-1])


def prepare(model: VQDiffusion, waiting: Engine) -> None:
    """Compiles for the model's own settings, with and without known tokens, in all shapes."""
    first = form_lib.defaults(model)
    known = np.zeros(form_lib.num_tokens(model), np.int32)
    known[0] = form_lib.num_codes(model)
    for begun in (first, dataclasses.replace(first, known=wire.pack(known))):
        for rows in ROWS:
            waiting.prepare([dataclasses.replace(begun, num_images=rows)])


def _key(request: Request) -> Hashable:
    """Requests that are equal in this run in one batch: rows differ in prompts, seed and codes."""
    own = {"prompt": "", "negative_prompt": "", "seed": 0, "num_images": 0}
    codes = {"known": str(bool(request.known)), "initial": str(bool(request.initial))}
    return dataclasses.replace(request, **own, **codes)


def _kind(requests: list[Request]) -> Hashable:
    """What decides the programs that a batch needs; numbers do not."""
    r = requests[0]
    choices = (r.rule, r.guidance_scale != 1, r.truncation < 1, bool(r.known), bool(r.initial))
    return (*choices, _rows(sum(request.num_images for request in requests)))


def _rows(count: int) -> int:
    return next(rows for rows in ROWS if rows >= count)


def sampling(model: VQDiffusion, requests: Sequence[Request]) -> Iterator[list[Part] | None]:
    """Samples requests of one key together.

    Yields:
      After every segment, a part of each request, or None where it is too early for a preview; at
      last their parts with the trajectory.
    """
    rows = [(request, j) for request in requests for j in range(request.num_images)]
    # Rows that fill up the batch repeat the first.
    rows += [rows[0]] * (_rows(len(rows)) - len(rows))
    first = requests[0]
    options = form_lib.options(first, model)
    for name in ("known", "initial"):
        if name in options:
            options[name] = np.stack([form_lib.codes(r, name, model) for r, _ in rows])
    call = functools.partial(
        model.sample_rows,
        [request.prompt for request, _ in rows],
        [(0, j) for _, j in rows],
        seed=[request.seed for request, _ in rows],
        batch_size=len(rows), callback_steps=EVERY, trajectory=True, **options,
    )  # fmt: skip
    if first.guidance_scale != 1:
        call.keywords["negative_prompt"] = [request.negative_prompt for request, _ in rows]
    last, shown = None, -math.inf
    for preview, made in _in_turns(call):
        last, now = preview or last, time.monotonic()
        if made is not None:
            yield _parts(requests, last, made.trajectory)
        elif last.step == last.num_steps or now - shown < PAUSE:
            yield None
        else:
            shown = now
            yield _parts(requests, last, None)


def _in_turns(call: Callable) -> Iterator[tuple[Preview | None, Any]]:
    """What ``call(callback=...)`` tells its callback, and at last (None, what it returns).

    The call runs in a thread of its own, but only while the next item is waited for. It is
    cancelled when nobody waits any more.
    """
    said, asked = queue.SimpleQueue(), queue.SimpleQueue()

    def callback(preview):
        said.put((preview, None, None))
        return asked.get()

    def run():
        try:
            said.put((None, call(callback=callback), None))
        except Exception as error:
            said.put((None, None, error))

    thread = threading.Thread(target=run, name="sampling", daemon=True)
    thread.start()
    try:
        while True:
            preview, made, error = said.get()
            if error is not None:
                raise error
            yield preview, made
            if preview is None:
                return
            asked.put(True)
    finally:
        asked.put(False)
        thread.join()


def _parts(
    requests: Sequence[Request], preview: Preview, trajectory: np.ndarray | None
) -> list[Part]:
    parts, begin = [], 0
    for request in requests:
        mine = slice(begin, begin + request.num_images)
        begin += request.num_images
        arrays = (preview.tokens, preview.pixels, preview.candidates, preview.probabilities)
        arrays = (array[mine] for array in (*arrays, preview.confidence))
        seen = None if trajectory is None else trajectory[:, mine]
        parts.append(Part(preview.step, preview.num_steps, *arrays, seen))
    return parts


def side(request: Request, part: Part) -> dict[str, Any]:
    """A part as the tokens' component takes it: texts only."""
    over = part.trajectory is not None
    return {
        "share": part.done / part.total,
        "request": request.fields() if over else None,
        "pictures": [wire.picture_url(pixels) for pixels in part.pixels],
        "tokens": [wire.pack(tokens) for tokens in part.tokens],
        "answers": [
            _answer(*row)
            for row in zip(part.candidates, part.probabilities, part.confidence, strict=True)
        ],
        "trajectory": [wire.pack(row) for row in part.trajectory.swapaxes(0, 1)] if over else None,
    }


def _answer(candidates, probabilities, confidence) -> dict[str, str]:
    return {
        "candidates": wire.pack(candidates),
        "probabilities": wire.pack_shares(probabilities),
        "confidence": wire.pack_shares(confidence),
    }


def codebook(model: VQDiffusion) -> dict[str, Any]:
    """All codes as little pictures: what the autoencoder makes of a patch of the same code."""
    rows, columns = form_lib.grid(model)
    patch = min(4, rows, columns)
    down, across = rows // patch, columns // patch
    count = -(-form_lib.num_codes(model) // (down * across))
    codes = np.arange(count * down * across).clip(max=form_lib.num_codes(model) - 1)
    grids = codes.reshape(count, down, across).repeat(patch, 1).repeat(patch, 2)
    whole = np.zeros((count, rows, columns), np.int32)
    whole[:, : down * patch, : across * patch] = grids
    pixels = model.decode_codes(whole.reshape(count, -1), 4)
    cell = pixels.shape[1] // rows
    # The middle of a patch, where its neighbours show least.
    first, last = cell * (patch // 2) - cell // 2, cell * (patch // 2) + cell - cell // 2
    side = patch * cell
    cells = pixels[:, : down * side, : across * side]
    cells = cells.reshape(count, down, side, across, side, 3).swapaxes(2, 3)
    cells = cells.reshape(-1, side, side, 3)[: form_lib.num_codes(model), first:last, first:last]
    url, columns = wire.sheet_url(np.ascontiguousarray(cells))
    return {"url": url, "columns": columns, "count": form_lib.num_codes(model)}


def encode(model: VQDiffusion, picture: str) -> dict[str, Any]:
    """A visitor's picture as tokens, and what they show; ``picture`` is a data URL."""
    codes = model.encode_images([wire.read_picture(picture)])
    return shown(model, codes, "Your picture")


def shown(model: VQDiffusion, codes: np.ndarray, label: str) -> dict[str, Any]:
    """Codes [J, N] as the tokens' component takes them."""
    pixels = model.decode_codes(codes, len(codes))
    return {
        "label": label,
        "pictures": [wire.picture_url(row) for row in pixels],
        "tokens": [wire.pack(row) for row in codes],
    }


def frames(model: VQDiffusion, trajectory: str) -> dict[str, Any]:
    """The pictures of all steps in one; ``trajectory`` is [F, N] in text."""
    pixels, _ = _decoded(model, trajectory)
    url, columns = wire.sheet_url(pixels)
    return {"url": url, "columns": columns}


def animation(model: VQDiffusion, trajectory: str) -> dict[str, Any]:
    """The steps as a GIF; what is still masked is grey."""
    pixels, hidden = _decoded(model, trajectory)
    hidden = hidden.reshape(-1, *form_lib.grid(model))
    made = [images.masked(frame, h) for frame, h in zip(pixels, hidden, strict=True)]
    made = [np.full_like(made[0], 160), *made]
    return {"url": wire.animation_url([Image.fromarray(images.enlarge(x)) for x in made])}


def bits_per_token(model: VQDiffusion, request: Request, codes: np.ndarray) -> np.ndarray:
    """What the model takes for codes [J, N] under the prompt of a request: float32 [J].

    It is a bound from ``NUM_DRAWS`` times of the schedule; guidance has no part in it.
    """
    prompt = None if model.config.denoiser.condition == "none" else request.prompt
    draws = min(NUM_DRAWS, model.config.diffusion.num_steps)
    return model.likelihood(prompts=prompt, codes=codes, num_draws=draws).bits_per_token


def paste(model: VQDiffusion, picture: str, tokens: str, known: str) -> dict[str, str]:
    """A visitor's picture, of its own size, with what was painted again put into it.

    Args:
      model: that painted.
      picture: a data URL.
      tokens: codes in text, of what the square in the middle became.
      known: likewise, with K where a token was painted; "" is everywhere.
    """
    pixels = np.asarray(wire.read_picture(picture))
    made = model.decode_codes(form_lib.read_codes(tokens, "tokens", model)[None])[0]
    painted = np.ones(form_lib.grid(model), bool)
    if known:
        codes = form_lib.read_codes(known, "known", model, masked=True)
        painted = (codes == form_lib.num_codes(model)).reshape(painted.shape)
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    rows, columns = (np.arange(side) * cells // side for cells in painted.shape)
    mask = np.zeros(pixels.shape[:2], bool)
    mask[top : top + side, left : left + side] = painted[rows[:, None], columns]
    return {"url": wire.png_url(np.asarray(masks.paste(made, pixels, mask)))}


def _decoded(model, trajectory: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [F, S, S, 3] of a text, and where they are still masked, [F, N].

    A masked place is decoded as the code that it gets in the end, so that its neighbours look as
    they will.
    """
    mask, num_tokens = form_lib.num_codes(model), form_lib.num_tokens(model)
    count = min(len(trajectory) * 3 // (8 * num_tokens), model.config.diffusion.num_steps)
    tokens = wire.unpack(trajectory, count * num_tokens, mask + 1, "trajectory")
    tokens = tokens.reshape(count, -1)
    hidden = tokens == mask
    if not count or hidden[-1].any():
        raise UserError("trajectory: must end with no token masked")
    return model.decode_codes(np.where(hidden, tokens[-1], tokens)), hidden
