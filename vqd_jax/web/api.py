"""The functions of the page for programs: what Gradio's client and plain HTTP call.

Letters: J images of a request, N image tokens, F steps.
"""

import functools
import uuid
from collections.abc import Callable
from typing import Any

import gradio as gr
import numpy as np

from vqd_jax.errors import UserError
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.web import form as form_lib
from vqd_jax.web import wire, work
from vqd_jax.web.engine import Engine, follow, reason, short

# Pictures that one call of ``decode`` may ask for.
MAX_DECODED = 64


def add(model: VQDiffusion, engine: Engine) -> None:
    """Adds the functions to the page that is being built; their hints are the schema."""
    gr.api(_streaming(_generating(model, engine)), api_name="generate")
    for function in _short(model, engine):
        gr.api(_told(function), api_name=function.__name__)


def _generating(model: VQDiffusion, engine: Engine) -> Callable:
    own = form_lib.defaults(model)

    async def generate(
        request: gr.Request,
        prompt: str = own.prompt,
        negative_prompt: str = own.negative_prompt,
        num_images: int = 1,
        seed: int = own.seed,
        rule: str = own.rule,
        num_steps: int = own.num_steps,
        guidance_scale: float = own.guidance_scale,
        truncation: float = own.truncation,
        temperature: float = own.temperature,
        known: list[int] | None = None,
        initial: list[int] | None = None,
        strength: float = own.strength,
        request_id: str = "",
    ) -> dict[str, Any]:
        """Pictures of one prompt; what comes before the last answer are previews.

        `known` has a code for each token, or the number of codes where one is to be found; the
        others stay. `initial` has the codes to begin from, noised by `strength`. `request_id` is a
        random UUID of the caller's own, by which `cancel` ends the request.
        """
        # The form's fields; the codes are written as its links write them.
        fields = {
            "prompt": prompt, "negative_prompt": negative_prompt, "num_images": num_images,
            "seed": seed, "rule": rule, "num_steps": num_steps, "guidance_scale": guidance_scale,
            "truncation": truncation, "temperature": temperature, "strength": strength,
            "known": _packed("known", known), "initial": _packed("initial", initial),
        }  # fmt: skip
        asked, name = form_lib.parse(fields, model), _id(request_id) if request_id else ""
        async for event, value in follow(engine, asked, asked.num_images, visitor(request), name):
            if event == "failed":
                raise UserError(value)
            if event == "part":
                answer = _answer(value, model)
                if value.trajectory is None:
                    yield answer
        yield answer | {"seconds": value, "request": asked.fields(), "is_over": True}

    return generate


def _short(model: VQDiffusion, engine: Engine) -> tuple[Callable, ...]:
    """The functions that have one answer."""

    async def cancel(request_id: str) -> dict[str, int]:
        """Ends the requests that were given this id; each of them fails with "it was cancelled".

        `cancelled` is how many they are: 0 if the request is over, or has not come in yet.
        """
        return {"cancelled": await short(engine, engine.cancel, _id(request_id))}

    async def encode(picture: str) -> dict[str, Any]:
        """The codes of a picture, a data URL, and the picture that they show."""
        made = await short(engine, work.encode, model, picture)
        codes = wire.unpack(
            made["tokens"][0], form_lib.num_tokens(model), form_lib.num_codes(model), "codes"
        )
        return {"codes": codes.tolist(), "picture": made["pictures"][0]}

    async def decode(codes: list[list[int]]) -> dict[str, Any]:
        """The pictures of codes, a list for each."""
        rows = _rows(codes, model)
        made = await short(engine, work.shown, model, rows, "")
        return {"pictures": made["pictures"]}

    return cancel, encode, decode


def visitor(request: gr.Request) -> str:
    """Whose turn a request takes: a session's, or that of all who call without one."""
    return request.session_hash or "api"


def _id(request_id: Any) -> str:
    """The id of a request as the engine knows it.

    Whoever has the id may cancel, so it must be one that nobody can guess: 122 random bits.
    """
    try:
        made = uuid.UUID(request_id)
    except (TypeError, ValueError, AttributeError):
        made = None
    if made is None or made.version != 4:
        raise UserError("request_id: must be a random UUID (version 4), as uuid.uuid4() makes it")
    return str(made)


def _streaming(function: Callable) -> Callable:
    """The function, whose errors tell the caller what was wrong with the call."""

    @functools.wraps(function)
    async def told(*args, **kwargs):
        try:
            async for answer in function(*args, **kwargs):
                yield answer
        except Exception as error:
            raise gr.Error(reason(error), print_exception=False) from error

    return told


def _told(function: Callable) -> Callable:
    @functools.wraps(function)
    async def told(*args, **kwargs):
        try:
            return await function(*args, **kwargs)
        except Exception as error:
            raise gr.Error(reason(error), print_exception=False) from error

    return told


def _packed(name: str, codes: Any) -> str:
    if codes is None:
        return ""
    whole = isinstance(codes, list) and all(type(code) is int for code in codes)
    if not whole or not all(0 <= code <= wire.MAX_CODES for code in codes) or not codes:
        raise UserError(f"{name}: must be a list of whole numbers, one for each token")
    return wire.pack(codes)


def _rows(codes: Any, model: VQDiffusion) -> np.ndarray:
    """int32 [J, N]."""
    if not isinstance(codes, list) or not 1 <= len(codes) <= MAX_DECODED:
        raise UserError(
            f"codes: must be 1..{MAX_DECODED} lists of {form_lib.num_tokens(model)} codes"
        )
    texts = [_packed("codes", row) for row in codes]
    return np.stack(
        [
            wire.unpack(t, form_lib.num_tokens(model), form_lib.num_codes(model), "codes")
            for t in texts
        ]
    )


def _answer(part: work.Part, model: VQDiffusion) -> dict[str, Any]:
    return {
        "num_codes": form_lib.num_codes(model),
        "step": part.done,
        "num_steps": part.total,
        "codes": part.tokens.tolist(),
        "pictures": [wire.png_url(pixels) for pixels in part.pixels],
        "is_over": False,
    }
