"""What a visitor asks for: its fields, their limits, and the same in the query of a link.

Letters: N image tokens, K codes, T steps of the schedule.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vqd_jax import config as config_lib
from vqd_jax.diffusion.choices import RULES
from vqd_jax.errors import UserError
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.web import wire

MAX_PROMPT = 500
MAX_PICTURES = 16


@dataclasses.dataclass(frozen=True)
class Request:
    """Pictures of one prompt; all that decides them, and nothing else.

    Attributes:
      prompt, negative_prompt: texts; for a class-conditional model labels, as texts.
      num_images: 1..``MAX_PICTURES``.
      seed, rule, num_steps, guidance_scale, truncation, temperature: of ``VQDiffusion.generate``.
      known: codes that stay, K where one is to be found (``wire.pack``); "" is nothing known.
      initial: codes to begin from, likewise; "" begins from noise alone.
      strength: share of the noise on ``initial``.
    """

    prompt: str = ""
    negative_prompt: str = ""
    num_images: int = 4
    seed: int = 0
    rule: str = "ordinary"
    num_steps: int = 100
    guidance_scale: float = 1.0
    truncation: float = 1.0
    temperature: float = 1.0
    known: str = ""
    initial: str = ""
    strength: float = 1.0

    def fields(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def grid(model: VQDiffusion) -> tuple[int, int]:
    """Rows and columns of the tokens."""
    return config_lib.model_config(model.config).denoiser.grid


def num_tokens(model: VQDiffusion) -> int:
    """N."""
    return math.prod(grid(model))


def num_codes(model: VQDiffusion) -> int:
    """K, which is the mask token, too."""
    return config_lib.model_config(model.config).denoiser.num_codes


def defaults(model: VQDiffusion) -> Request:
    """The request that the model's own config makes."""
    c, guided = model.config.sampling, model.config.denoiser.condition != "none"
    return Request(
        num_images=min(4, MAX_PICTURES),
        rule=c.rule if c.rule in RULES else "ordinary",
        num_steps=c.num_steps or model.config.diffusion.num_steps,
        guidance_scale=float(c.guidance_scale) if guided else 1.0,
        truncation=float(c.truncation),
    )


def parse(fields: Mapping[str, Any], model: VQDiffusion, *, texts: bool = False) -> Request:
    """A request of these fields; those that are missing are the model's defaults.

    Args:
      fields: values by name.
      model: that is to meet the request.
      texts: numbers may be written as texts, as in the query of a link.

    Raises:
      UserError: a field is unknown, of another type, or out of its limits. The message begins with
        its name.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(Request)}
    unknown = sorted(set(fields) - set(kinds))
    if unknown:
        raise UserError(f"{unknown[0][:40]!r}: there is no such field; {', '.join(kinds)}")
    values = {name: _value(name, kinds[name], value, texts) for name, value in fields.items()}
    request = dataclasses.replace(defaults(model), **values)
    check(request, model)
    return request


def _value(name: str, kind: type, value: Any, texts: bool) -> Any:
    try:
        if texts and kind is not str and isinstance(value, str):
            value = kind(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        said = {str: "a text", int: "a whole number", float: "a number"}[kind]
        raise UserError(f"{name}: must be {said}")
    return value


def check(request: Request, model: VQDiffusion) -> None:
    """Raises ``UserError`` that begins with the name of a field that is out of its limits."""
    for name in ("prompt", "negative_prompt"):
        if len(getattr(request, name)) > MAX_PROMPT:
            raise UserError(f"{name}: is longer than {MAX_PROMPT} characters")
    if not 1 <= request.num_images <= MAX_PICTURES:
        raise UserError(f"num_images: must lie in 1..{MAX_PICTURES}")
    if not 0 <= request.seed < 2**32:
        raise UserError("seed: must lie in 0..4294967295")
    if not 1 <= request.num_steps <= model.config.diffusion.num_steps:
        raise UserError(f"num_steps: must lie in 1..{model.config.diffusion.num_steps}")
    if request.negative_prompt and request.guidance_scale == 1:
        raise UserError("negative_prompt: needs a guidance_scale other than 1")
    model.settings(**options(request, model))


def read_codes(text: str, name: str, model: VQDiffusion, *, masked: bool = False) -> np.ndarray:
    """int32 [N] of the text of a picture's codes; with ``masked`` K is allowed, too.

    Raises:
      UserError: it is none; the message begins with ``name``.
    """
    return wire.unpack(text, num_tokens(model), num_codes(model) + masked, name)


def codes(request: Request, name: str, model: VQDiffusion) -> np.ndarray | None:
    """int32 [N] of the field ``known`` or ``initial``; None where it is empty."""
    text = getattr(request, name)
    if not text:
        return None
    return read_codes(text, name, model, masked=name == "known")


def options(request: Request, model: VQDiffusion) -> dict[str, Any]:
    """The key-word arguments of ``VQDiffusion.settings``."""
    chosen = {
        name: getattr(request, name)
        for name in ("rule", "num_steps", "guidance_scale", "truncation", "temperature")
    }
    for name in ("known", "initial"):
        chosen[name] = codes(request, name, model)
    if chosen["initial"] is not None:
        chosen["strength"] = request.strength
    return {name: value for name, value in chosen.items() if value is not None}
