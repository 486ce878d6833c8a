"""The page: what stands where, and what a click does.

Letters: J images of a request, N image tokens, C candidates of a token.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any

import gradio as gr

from vqd_jax.diffusion.choices import RULES
from vqd_jax.errors import UserError
from vqd_jax.pipeline import VQDiffusion
from vqd_jax.web import api, wire, work
from vqd_jax.web import form as form_lib
from vqd_jax.web.engine import Engine, follow, reason, short
from vqd_jax.web.form import Request

ASSETS = resources.files("vqd_jax.web") / "assets"
WIDTH = "main.app { max-width: 75rem !important; }"

# What the form has, in its order; the rest of a request comes from the tokens.
_FORM = (
    "prompt", "negative_prompt", "num_images", "seed", "rule", "num_steps", "guidance_scale",
    "truncation", "temperature", "strength",
)  # fmt: skip
_COMPARED = ("rule", "num_steps", "guidance_scale", "truncation", "temperature")


async def _values(
    model: VQDiffusion, engine: Engine, requests: list[Request], visitor: str
) -> AsyncIterator[dict[str, Any]]:
    """What the tokens' component shows while it waits for one or two answers, and at the end."""
    sides: list[dict[str, Any]] = []
    for number, request in enumerate(requests):
        before = "" if len(requests) == 1 else f"Side {number + 1} of {len(requests)}: "
        part = None
        async for event, value in follow(engine, request, request.num_images, visitor):
            if event == "failed":
                yield {"phase": "failed", "text": f"{before}{value}"}
                return
            if event == "waiting":
                text = f"{value} before you." if value else "You are next."
                yield {"phase": "running", "text": f"{before}{text}", "share": 0}
            elif event == "preparing":
                text = "This kind of request is new: its program is being compiled."
                yield {"phase": "running", "text": f"{before}{text}", "share": 0}
            elif event == "part":
                part = value
                shown = await asyncio.to_thread(work.side, request, part)
                if part.trajectory is None:
                    yield {
                        "phase": "running",
                        "text": f"{before}step {part.done} of {part.total}",
                        "share": part.done / part.total,
                        "sides": [*sides, shown],
                    }
        shown["seconds"] = value
        if len(requests) > 1:
            bits = await asyncio.to_thread(work.bits_per_token, model, request, part.tokens)
            label = _label(request, requests, value)
            shown["label"] = f"{label} · {bits.mean():.2f} bits a token"
        sides.append(shown)
    seconds = sum(side["seconds"] for side in sides)
    yield {"phase": "made", "text": f"Made in {seconds:.1f} s.", "sides": sides}


def _label(request: Request, requests: list[Request], seconds: float) -> str:
    """What a side differs in from the other, and its time."""
    words, other = [f"{seconds:.1f} s"], next((r for r in requests if r is not request), request)
    for name in _COMPARED:
        if getattr(request, name) != getattr(other, name):
            words.append(f"{name.replace('_', ' ')} {getattr(request, name)}")
    return " · ".join(words)


def build(model: VQDiffusion, engine: Engine) -> gr.Blocks:
    """The page of a model, and the same functions for programs."""
    own = form_lib.defaults(model)
    with _Page(title="VQ-Diffusion", analytics_enabled=False) as blocks:
        gr.Markdown(_heading(model))
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                form, random_seed = _form(model, own)
                with gr.Row():
                    make = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", elem_id="stop")
                with gr.Accordion("Side by side", open=False):
                    other = _compared(model, own, "_2")
                    compare = gr.Button("Generate both", elem_id="both")
            with gr.Column(scale=3, min_width=300):
                tokens = _tokens(model, engine)
        fields = [form[name] for name in _FORM]

        from_form, side_by_side, from_tokens, fill = _handlers(model, engine)
        asked = {"outputs": [tokens, form["seed"]], "api_visibility": "private", **_QUIET}
        begun = [
            make.click(from_form, [random_seed, *fields], **asked),
            compare.click(side_by_side, [random_seed, *fields, *other], **asked),
            tokens.paint(from_tokens, [random_seed, *fields], **asked),
        ]
        if isinstance(form["prompt"], gr.Textbox):
            # A list of classes has no key that sends it.
            begun.append(form["prompt"].submit(from_form, [random_seed, *fields], **asked))
        shown = [random_seed, *fields]
        tokens.fill(fill, shown, shown, api_visibility="private", **_QUIET)
        # The component says that it stopped.
        stop.click(None, cancels=begun, api_visibility="private")
        api.add(model, engine)
    return blocks.queue(max_size=1024, default_concurrency_limit=None)


def _handlers(model: VQDiffusion, engine: Engine) -> tuple[Callable, ...]:
    """What clicks do: of Generate, of Generate both, on the tokens; and what fills the form."""

    async def run(requests: list[dict], visitor: str, texts: bool = False):
        # The component leaves out what a run still says after it was stopped.
        seed, run_id = gr.skip(), secrets.token_hex(4)
        try:
            parsed = [form_lib.parse(fields, model, texts=texts) for fields in requests]
            seed = parsed[0].seed
            async for value in _values(model, engine, parsed, visitor):
                yield value | {"run": run_id}, seed
        except Exception as error:
            yield {"phase": "failed", "text": reason(error), "run": run_id}, seed

    async def from_form(request: gr.Request, is_random: bool, *values):
        async for shown in run([_chosen(values, is_random)], api.visitor(request)):
            yield shown

    async def side_by_side(request: gr.Request, is_random: bool, *values):
        chosen = _chosen(values[: len(_FORM)], is_random)
        second = chosen | dict(zip(_COMPARED, values[len(_FORM) :], strict=True))
        async for shown in run([chosen, second], api.visitor(request)):
            yield shown

    async def from_tokens(request: gr.Request, event: gr.EventData, is_random: bool, *values):
        detail = event._data or {}
        # A link or a recipe says everything; a click on the tokens says what the form does not.
        whole = detail.get("fields")
        chosen = whole or _chosen(values, is_random) | detail
        async for shown in run([chosen], api.visitor(request), texts=bool(whole)):
            yield shown

    def fill(event: gr.EventData, *values):
        """Puts the fields of a link or of a recipe into the form; what is wrong stays out."""
        try:
            request = form_lib.parse(event._data or {}, model, texts=True)
        except UserError:
            return values
        return False, *(getattr(request, name) for name in _FORM)

    return from_form, side_by_side, from_tokens, fill


class _Page(gr.Blocks):
    """Gradio's page, which lets values that nobody asked for pass."""

    def validate_inputs(self, block_fn, inputs):
        if len(inputs) != len(block_fn.inputs):
            raise gr.Error(
                f"{block_fn.api_name}: there are {len(inputs)} values for "
                f"{len(block_fn.inputs)} parameters",
                print_exception=False,
            )


_QUIET = {"show_progress": "hidden"}


def _chosen(values, is_random: bool) -> dict[str, Any]:
    chosen = dict(zip(_FORM, values, strict=True))
    if is_random:
        chosen["seed"] = secrets.randbelow(2**32)
    return chosen


def _heading(model: VQDiffusion) -> str:
    rows, columns = form_lib.grid(model)
    side = model.config.data.image_size
    return (
        "# VQ-Diffusion\n"
        f"A picture of {side} × {side} pixels is a grid of {rows} × {columns} tokens, each one of "
        f"{form_lib.num_codes(model):,} codes. They begin masked and are decided step by step. "
        "Each of them can be taken back."
    )


def _form(model: VQDiffusion, own: Request) -> tuple[dict[str, Any], gr.Checkbox]:
    """The components of the request's fields by name, and whether the seed is drawn."""
    kind, form = model.config.denoiser.condition, {}
    form["prompt"] = _prompt(model, "Prompt", "What the picture shows.", kind != "none")
    form["num_images"] = gr.Slider(
        1, form_lib.MAX_PICTURES, own.num_images, step=1, label="Pictures", elem_id="num_images"
    )
    with gr.Row():
        form["seed"] = gr.Number(
            own.seed, precision=0, minimum=0, maximum=2**32 - 1, label="Seed", elem_id="seed",
            info="The same seed and settings make the same pictures.",
        )  # fmt: skip
        random_seed = gr.Checkbox(True, label="A new seed every time", elem_id="random_seed")
    with gr.Accordion("Settings", open=False):
        form["negative_prompt"] = _prompt(
            model, "Negative prompt", "Guidance leads away from it.", kind != "none"
        )
        form |= dict(zip(_COMPARED, _compared(model, own, ""), strict=True))
        form["strength"] = gr.Slider(
            0.05, 1, 0.5, step=0.05, label="Strength", elem_id="strength",
            info="Share of the noise when a whole picture is varied; at 1 nothing of it is left.",
        )  # fmt: skip
    return form, random_seed


def _prompt(model: VQDiffusion, label: str, info: str, visible: bool) -> Any:
    name = label.lower().replace(" ", "_")
    if model.config.denoiser.condition == "class":
        labels = ["", *map(str, range(model.config.denoiser.num_classes))]
        return gr.Dropdown(labels, value="", label=label.replace("rompt", "lass"), elem_id=name)
    return gr.Textbox(
        value="", label=label, info=info, visible=visible, elem_id=name,
        lines=1, max_lines=4, max_length=form_lib.MAX_PROMPT,
    )  # fmt: skip


def _compared(model: VQDiffusion, own: Request, ending: str) -> list[Any]:
    """The components of ``_COMPARED``; ``ending`` tells those of the other side apart."""
    total, guided = model.config.diffusion.num_steps, model.config.denoiser.condition != "none"
    return [
        gr.Dropdown(
            list(RULES), value=own.rule, label="Rule", elem_id=f"rule{ending}",
            info="Which tokens a step decides: by chance, by purity, by confidence, ...",
        ),
        gr.Slider(
            1, total, own.num_steps, step=1, label="Steps", elem_id=f"num_steps{ending}",
            info="Calls of the network; fewer are faster.",
        ),
        gr.Slider(
            0, 10, own.guidance_scale, step=0.1, label="Guidance", visible=guided,
            elem_id=f"guidance_scale{ending}", info="1 is none; more follows the prompt closer.",
        ),
        gr.Slider(
            0.5, 1, own.truncation, step=0.01, label="Truncation", elem_id=f"truncation{ending}",
            info="Share of the probability that is kept; 1 is all.",
        ),
        gr.Slider(
            0.1, 2, own.temperature, step=0.05, label="Temperature",
            elem_id=f"temperature{ending}", info="Below 1, likely codes become likelier.",
        ),
    ]  # fmt: skip


def _tokens(model: VQDiffusion, engine: Engine) -> gr.HTML:
    """The component of pictures and tokens, ``assets/tokens.*``."""
    rows, columns = form_lib.grid(model)
    config = {
        "rows": rows,
        "columns": columns,
        "numCodes": form_lib.num_codes(model),
        "numCandidates": work.NUM_CANDIDATES,
        "side": model.config.data.image_size,
        "model": model.fingerprint()[:16],
        "maxBytes": wire.MAX_BYTES,
        "codebook": work.codebook(model),
    }

    def question(function: Callable) -> Callable:
        async def ask(fields: dict[str, Any]) -> dict[str, Any]:
            try:
                if not isinstance(fields, dict):
                    raise UserError("the question must be an object")
                return await short(engine, _call, function, model, fields)
            except Exception as error:
                return {"failed": reason(error)}

        ask.__name__ = function.__name__
        return ask

    names = (work.encode, work.frames, work.animation, work.paste)
    return gr.HTML(
        {"phase": "idle", "text": ""},
        html_template=(ASSETS / "tokens.html").read_text(encoding="utf-8"),
        css_template=(ASSETS / "tokens.css").read_text(encoding="utf-8"),
        js_on_load=(ASSETS / "tokens.js").read_text(encoding="utf-8"),
        apply_default_css=False, server_functions=[question(name) for name in names],
        config=config, elem_id="tokens",
    )  # fmt: skip


def _call(function: Callable, model: VQDiffusion, fields: dict[str, Any]) -> dict[str, Any]:
    """A function of ``work`` with its arguments by name; others are refused."""
    kinds = {name: kind for name, kind in function.__annotations__.items() if name != "return"}
    del kinds["model"]
    for name in [*fields, *kinds]:
        kind = kinds.get(name)
        plain = dict if kind not in (str, int) else kind
        if kind is None or type(fields.get(name)) is not plain:
            raise UserError(f"{str(name)[:40]!r}: must be {', '.join(kinds)}, and no other field")
    return function(model, **fields)
