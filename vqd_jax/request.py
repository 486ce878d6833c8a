"""What a user asks ``VQDiffusion`` for, checked and turned into rows of arrays.

Letters: P prompts, J images of each prompt, R rows (one for each picture), N image tokens, L text
tokens, K codes.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vqd_jax.data.text import ClipTokenizer
from vqd_jax.diffusion import choices, sampler
from vqd_jax.errors import UserError

# What ``diffusion.choices.settings`` takes, beside the model's schedule and grid.
OPTIONS = tuple(inspect.signature(choices.settings).parameters)[2:]
# Words of other programs that are spelled too differently to be guessed.
_ELSEWHERE = {
    "num_inference_steps": "num_steps",
    "steps": "num_steps",
    "num_images_per_prompt": "num_images",
    "generator": "seed",
    "seeds": "seed",
    "cfg_scale": "guidance_scale",
    "truncation_rate": "truncation",
    "negative_prompts": "negative_prompt",
    "prompt": "prompts",
    "sampler": "rule",
    "scheduler": "rule",
    "filter_ratio": "strength",
    "callback_on_step_end": "callback",
    "latents": "initial",
    "torch_dtype": "dtype",
    "device_map": "mesh",
}


def require(condition: bool, message: str) -> None:
    """Raises ``UserError`` unless the condition holds."""
    if not condition:
        raise UserError(message)


def known_words(*also: str) -> Callable[[Callable], Callable]:
    """Decorates a function so that it refuses a keyword that it does not know in one line.

    Args:
      *also: keywords that it takes beside those of its signature.
    """

    def decorate(function: Callable) -> Callable:
        own = [n for n in inspect.signature(function).parameters if n not in ("self", "options")]
        names = [*own, *(name for name in also if name not in own)]

        @functools.wraps(function)
        def checked(*args, **options):
            for name in options:
                require(name in names, _unknown(function.__name__, name, names))
            return function(*args, **options)

        return checked

    return decorate


def _unknown(function: str, name: str, names: Sequence[str]) -> str:
    other = _ELSEWHERE.get(name)
    near = [other] if other in names else difflib.get_close_matches(name, names, 1, 0.5)
    advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    return f"{function}() has no option {name}; {advice}"


class Rows(NamedTuple):
    """The pictures that are to be drawn, one row for each.

    Attributes:
      conditions: text ids int32 [R, L], labels [R] or, without a condition, zeros [R].
      nulls: the same of what guidance leads away from.
      seeds: uint32 [R].
      pairs: uint32 [R, 2], the numbers (i, j) of prompt and image.
      known: int32 [R, N] or None; see ``sampler.Settings``.
      initial: int32 [R, N] or None.
    """

    conditions: np.ndarray
    nulls: np.ndarray
    seeds: np.ndarray
    pairs: np.ndarray
    known: np.ndarray | None
    initial: np.ndarray | None


class Images:
    """J images of each of P prompts, in rows: those of the first prompt come first.

    Args:
      prompts: P texts or labels.
      num_images: J.
      seed, negative: of ``VQDiffusion.generate``; one, or one for each prompt.

    Attributes:
      prompts, pairs, seeds, negatives: what ``rows`` takes, one for each image, or one for all.
    """

    def __init__(self, prompts: Sequence, num_images: int, seed: Any, negative: Any):
        self._num_prompts, self._num_images = len(prompts), num_images
        # With seeds of its own, a prompt is the first of its call.
        numbers = range(len(prompts)) if np.ndim(seed) == 0 else [0] * len(prompts)
        self.pairs = [(i, j) for i in numbers for j in range(num_images)]
        self.prompts = self._of_images("prompts", prompts)
        self.seeds = seeds(seed, len(prompts)).repeat(num_images)
        is_list = isinstance(negative, list | tuple)
        self.negatives = self._of_images("negative_prompt", negative) if is_list else negative

    def _of_images(self, name: str, values: Sequence) -> list:
        of_prompts = spread(name, values, self._num_prompts)
        return [value for value in of_prompts for _ in range(self._num_images)]

    def spread(self, options: dict[str, Any], num_tokens: int) -> dict[str, Any]:
        """Options of ``settings`` with the rows of ``known`` and ``initial`` for every image."""
        found = dict(options)
        for name in ("known", "initial"):
            if found.get(name) is not None:
                found[name] = np.stack(
                    self._of_images(name, as_rows(name, found[name], num_tokens))
                )
        return found


def rows(
    conditions: "Conditions",
    prompts: Sequence[str] | Sequence[int],
    pairs: Sequence[tuple[int, int]],
    settings: sampler.Settings,
    seed: int | Sequence[int],
    negative: str | int | Sequence[str] | Sequence[int] | None,
    sizes: tuple[int, int],
) -> Rows:
    """The rows of R prompts and pairs.

    Args:
      conditions: of the model.
      prompts: R texts or labels.
      pairs: R pairs (i, j).
      settings: ``known`` and ``initial`` are for all rows, or one for each.
      seed: for all rows, or one for each.
      negative: likewise; None is the empty prompt.
      sizes: (N, K).

    Raises:
      UserError: something is impossible; the message names it.
    """
    count, (num_tokens, num_codes) = len(pairs), sizes
    guided = settings.guidance is not None
    require(guided or negative is None, "negative_prompt: needs a guidance_scale")
    negatives = negative if isinstance(negative, list | tuple) else [negative]
    negatives = ["" if one is None else one for one in spread("negative_prompt", negatives, count)]

    def codes(name, largest):
        if (value := getattr(settings, name)) is None:
            return None
        found = token_codes(name, value, num_tokens, largest)
        return np.stack(spread(name, found, count))

    return Rows(
        conditions(prompts),
        conditions(negatives),
        seeds(seed, count),
        np.array(pairs, np.uint32),
        codes("known", num_codes),
        codes("initial", num_codes - 1),
    )


def listed(value: Any) -> list:
    """A value, or several in a list, tuple or array [P, ...] of pictures, as a list."""
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim == 4):
        return list(value)
    return [value]


def spread(name: str, values: Sequence[Any], count: int) -> list:
    """One value for each of P; a single one is for all."""
    values = list(values)
    fits = len(values) in (1, count)
    require(
        fits, f"{name}: there are {len(values)} for {count} pictures; give one, or one for each"
    )
    return values * (count // len(values))


def as_rows(name: str, value: Any, num_tokens: int) -> np.ndarray:
    """Whole numbers [P, N] of [N], [rows, columns], [P, N] or [P, J, N]."""
    codes = np.asarray(value)
    require(
        codes.size > 0 and codes.size % num_tokens == 0 and codes.dtype.kind in "iu",
        f"{name} is {codes.dtype} {list(codes.shape)}: must be whole numbers [{num_tokens}], or "
        f"[P, {num_tokens}] for P pictures",
    )
    return codes.reshape(-1, num_tokens)


def token_codes(name: str, value: Any, num_tokens: int, largest: int) -> np.ndarray:
    """Codes int32 [P, N] in 0..largest; see ``as_rows``."""
    codes = as_rows(name, value, num_tokens)
    require(
        0 <= codes.min() and codes.max() <= largest,
        f"{name} lies in {codes.min()}..{codes.max()}; the model knows 0..{largest}",
    )
    return codes.astype(np.int32)


def token_marks(value: Any, num_tokens: int) -> np.ndarray:
    """Marks bool [P, N] of [N], [rows, columns], [P, N] or [P, rows, columns]."""
    marks = np.asarray(value)
    require(
        marks.size > 0 and marks.size % num_tokens == 0 and marks.dtype.kind in "biu",
        f"mask is {marks.dtype} {list(marks.shape)}: must be true or false for each of "
        f"{num_tokens} tokens",
    )
    return marks.reshape(-1, num_tokens).astype(bool)


def seeds(seed: int | Sequence[int], count: int) -> np.ndarray:
    """uint32 [R] of one seed for all or one for each."""
    found = spread("seed", np.ravel(seed) if isinstance(seed, np.ndarray) else listed(seed), count)
    for one in found:
        require(
            isinstance(one, int | np.integer) and 0 <= one < 2**32,
            f"seed={one}: must lie in 0..2**32-1",
        )
    # JAX would make an int32 of a Python int, and seeds may be larger.
    return np.array(found, np.uint32)


class Conditions:
    """Turns prompts into what the networks read.

    Args:
      config: of the model.
      tokenizer: of its texts.
    """

    def __init__(self, config: ConfigDict, tokenizer: ClipTokenizer):
        self._config, self._tokenizer = config, tokenizer

    def __call__(self, prompts: Iterable[str | int]) -> np.ndarray:
        """Text ids int32 [R, L], labels [R] or, without a condition, zeros [R].

        Raises:
          UserError: a prompt is none of this model.
        """
        prompts, kind = list(prompts), self._config.denoiser.condition
        if kind == "none":
            require(set(prompts) == {""}, "this model is unconditional: it takes no prompt")
            return np.zeros(len(prompts), np.int32)
        if kind == "text":
            for text in prompts:
                require(isinstance(text, str), f"prompt {text!r}: must be a text")
            return self.text_ids(prompts)
        classes = self._config.denoiser.num_classes
        return np.array([_label(prompt, classes) for prompt in prompts], np.int32)

    def text_ids(self, texts: Sequence[str]) -> np.ndarray:
        """int32 [R, L]."""
        size = self._config.text_encoder.vocab_size
        require(
            self._tokenizer.vocab_size == size,
            f"the tokenizer has {self._tokenizer.vocab_size} ids and the text encoder {size}: "
            "the model folder lacks the tokenizer that belongs to it",
        )
        return self._tokenizer.encode_batch(list(texts))


def _label(prompt: str | int, classes: int) -> int:
    """The class that a prompt names by its number; the empty one is no class."""
    if isinstance(prompt, str):
        prompt = classes if not prompt.strip() else int(prompt) if prompt.isdigit() else -1
    require(
        isinstance(prompt, int | np.integer) and 0 <= prompt <= classes,
        f"class label {prompt!r}: must be a whole number in 0..{classes - 1}; {classes} is none",
    )
    return int(prompt)
