"""The page of a report: tables, curves and pictures in one HTML file that needs no network."""

import base64
import html
import io
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from PIL import Image

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em;
  color: #1b1f24; background: #fff }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em }
table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums }
th, td { padding: .3em .7em; border-bottom: 1px solid #d8dde3; text-align: right;
  white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 15em }
thead th { border-bottom: 2px solid #8a939d; white-space: normal; vertical-align: bottom }
.wide { overflow-x: auto } .error { color: #68717b; font-size: .86em }
img { max-width: 100%; image-rendering: pixelated; border: 1px solid #d8dde3 }
figure { margin: 0 } figcaption { color: #4b545e; margin: .3em 0 1em }
.curves { display: flex; flex-wrap: wrap; gap: 1em } p.protocol { max-width: 62em }
code { overflow-wrap: anywhere }
"""
# What a figure is called, its unit, and whether more is better; None is neither.
_NAMES = {
    "frechet": ("Fréchet distance", "", False),
    "frechet_extrapolated": ("Fréchet distance at 1/N = 0", "", False),
    "kid": ("kernel distance (KID) × 1,000", "1000", False),
    "cmmd": ("CMMD", "", False),
    "precision": ("precision", "%", True),
    "recall": ("recall", "%", True),
    "density": ("density", "", True),
    "coverage": ("coverage", "%", True),
    "copies": ("nearer to a training picture than those to each other", "%", None),
    "copies_held_out": ("the same of held-out pictures", "%", None),
    "retrieval_1": ("real picture of the caption is nearest", "%", True),
    "retrieval_5": ("it is among the five nearest", "%", True),
    "clip_score": ("CLIP score", "", True),
    "attributes": ("attributes that are right", "%", True),
    "attribute_colour": ("colour", "%", True),
    "attribute_shape": ("shape", "%", True),
    "attribute_size": ("size", "%", True),
    "attribute_position": ("position", "%", True),
    "attribute_count": ("number of objects", "%", True),
    "psnr": ("PSNR in dB", "", True),
    "ssim": ("SSIM", "", True),
    "perceptual": ("perceptual distance (SqueezeNet)", "", False),
}
_FACTORS = {"%": 100.0, "1000": 1000.0, "": 1.0}
_COLOURS = ("#1f6fb2", "#c2571a", "#2f8f4e", "#8e44ad", "#b03052", "#6b7a1e", "#0f8b8d", "#555")
# Settings that are columns of a table; more are rows.
_FEW = 4
# Of a curve's picture, in pixels.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 540, 300, 62, 14, 26, 44


def render(report: dict[str, Any], sheets: dict[str, Image.Image], when: str) -> str:
    """The page.

    Args:
      report: as in ``report.json``.
      sheets: pictures by their titles.
      when: a sentence that tells when it was finished; the only one that differs when the same
        evaluation is made again.
    """
    parts = [f"<h1>Evaluation: protocol {_text(report['protocol']['name'])}</h1>"]
    parts.append(f'<p class="protocol">{_text(report["paragraph"])}</p>')
    parts.append(f'<p id="time">{_text(when)}</p>')
    for net in report["features"]:
        name = net["name"]
        title = "Fréchet inception distance" if name.startswith("inception") else name
        parts.append(f"<h2>In the features of {_text(title)}</h2>")
        results = [(r["setting"], r["figures"][name]) for r in report["results"]]
        top = report["ceiling"]["figures"].get(name, {})
        parts.append(_table(results, top, is_inception=name.startswith("inception")))
        parts.append(curves(results, is_inception=name.startswith("inception")))
    if any(r["attributes"] for r in report["results"]):
        parts.append("<h2>What the captions ask for, measured from pixels</h2>")
        results = [(r["setting"], r["attributes"]) for r in report["results"]]
        parts.append(_table(results, report["ceiling"].get("attributes", {})))
        parts.append(curves(results))
    parts.append(_of_model(report))
    parts += [_figure(title, sheet) for title, sheet in sheets.items()]
    head = f'<meta charset="utf-8"><title>Evaluation</title><style>{_STYLE}</style>'
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _text(value: Any) -> str:
    return html.escape(str(value))


def _name(key: str, is_inception: bool = False) -> tuple[str, str, bool | None]:
    name, unit, more = _NAMES.get(key, (key.replace("_", " "), "", None))
    return name.replace("Fréchet distance", "FID") if is_inception else name, unit, more


def _number(figure: dict[str, float] | float, unit: str) -> str:
    if not isinstance(figure, dict):
        return f"{figure:,}" if isinstance(figure, int) else f"{figure:,.4g}"
    value, error = (figure[key] * _FACTORS[unit] for key in ("value", "error"))
    digits = 2 if not error or not math.isfinite(error) else 1 - math.floor(math.log10(error))
    digits = max(0, min(digits, 6))
    sign = " %" if unit == "%" else ""
    return f"{value:,.{digits}f}{sign} <span class=error>± {error:,.{digits}f}</span>"


def _table(results, top: dict[str, Any], is_inception: bool = False) -> str:
    """Figures in rows and settings in columns, or the other way round if there are many settings.

    The ceiling is the last one.
    """
    keys = list(dict.fromkeys(key for _, found in results for key in found))
    if not keys:
        return ""
    shown = [(_label(setting), found) for setting, found in results]
    if any(key in top for key in keys):
        shown.append(("the ceiling: real pictures through the autoencoder", top))
    arrows = {True: " ↑", False: " ↓", None: ""}
    names = [_name(key, is_inception) for key in keys]
    grid = [["", *(name + arrows[more] for name, _, more in names)]]
    grid[0] = [_text(name) for name in grid[0]]
    for label, found in shown:
        cells = (_number(found[k], _name(k)[1]) if k in found else "–" for k in keys)
        grid.append([_text(label), *cells])
    if len(results) <= _FEW:
        grid = [list(row) for row in zip(*grid, strict=True)]
    head = "".join(f"<th>{cell}</th>" for cell in grid[0])
    rows = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in grid[1:])
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _label(setting: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in setting.items())


def _of_model(report) -> str:
    parts = []
    if again := report["ceiling"].get("reconstruction"):
        parts.append("<h2>Real pictures through the autoencoder</h2>" + _list(again))
    if gap := report["captions"]:
        parts.append("<h2>What captions tell the model: bits a token of held-out pictures</h2>")
        parts.append(_list(gap))
    return "".join(parts)


def _list(found: dict[str, Any]) -> str:
    rows = ""
    for key, figure in found.items():
        name, unit, _ = _name(key)
        rows += f"<tr><td>{_text(name)}</td><td>{_number(figure, unit)}</td></tr>"
    return f"<table><tbody>{rows}</tbody></table>"


def _figure(title: str, sheet: Image.Image) -> str:
    encoded = io.BytesIO()
    sheet.save(encoded, format="PNG", optimize=True)
    data = base64.b64encode(encoded.getvalue()).decode("ascii")
    return (
        f'<h2>{_text(title)}</h2><figure><img alt="{_text(title)}" '
        f'src="data:image/png;base64,{data}"></figure>'
    )


class Curve(NamedTuple):
    """Points of one line: (x, value, error)."""

    label: str
    points: list[tuple[float, float, float]]


def curves(results: Sequence[tuple[dict, dict]], is_inception: bool = False) -> str:
    """A curve of every figure over every axis with two numbers or more; SVG with error bars.

    A line joins the settings that differ in this axis alone.
    """
    axes = _axes([setting for setting, _ in results])
    keys = list(dict.fromkeys(key for _, found in results for key in found))
    # It does not depend on the setting.
    keys = [key for key in keys if key != "copies_held_out"]
    drawn = ""
    for axis in axes:
        for key in keys:
            name, unit, _ = _name(key, is_inception)
            lines = _lines(results, axis, key, _FACTORS[unit])
            if lines:
                title = f"{name}{' in %' if unit == '%' else ''}"
                drawn += plot(lines, axis.replace("_", " "), title)
    return f'<div class="curves">{drawn}</div>' if drawn else ""


def _axes(settings: list[dict]) -> list[str]:
    def numbers(axis):
        values = {setting.get(axis) for setting in settings}
        return len(values) > 1 and all(isinstance(v, int | float) for v in values)

    return [axis for axis in ("num_steps", "guidance_scale", "truncation") if numbers(axis)]


def _lines(results, axis, key, factor) -> list[Curve]:
    lines = {}
    for setting, found in results:
        if key in found and isinstance(found[key], dict):
            others = {name: v for name, v in setting.items() if name != axis}
            point = setting[axis], found[key]["value"] * factor, found[key]["error"] * factor
            lines.setdefault(_label(others), []).append(point)
    # Words that all lines have in common tell nothing.
    words = [label.split(", ") for label in lines]
    common = set.intersection(*map(set, words)) if len(words) > 1 else set()
    named = [
        Curve(", ".join(word for word in label.split(", ") if word not in common), sorted(points))
        for label, points in lines.items()
    ]
    return [line for line in named if len(line.points) > 1]


def plot(lines: Sequence[Curve], x_title: str, title: str) -> str:
    """Lines with error bars of one standard error, as SVG."""
    points = [point for line in lines for point in line.points]
    xs = [x for x, _, _ in points]
    low, high = min(y - e for _, y, e in points), max(y + e for _, y, e in points)
    spread = (high - low) or abs(high) or 1.0
    low, high = low - 0.06 * spread, high + 0.06 * spread
    logarithmic = min(xs) > 0 and max(xs) / min(xs) >= 8
    scale = math.log if logarithmic else float
    left, right = scale(min(xs)), scale(max(xs))

    def place(x, y):
        across = (scale(x) - left) / ((right - left) or 1) * (_WIDTH - _LEFT - _RIGHT - 20) + 10
        up = (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    parts = [_frame(sorted(set(xs)), _ticks(low, high), place, x_title, title)]
    for number, line in enumerate(lines):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y, _ in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, error in line.points:
            (across, top), (_, bottom) = place(x, y + error), place(x, y - error)
            middle = place(x, y)[1]
            parts.append(
                f'<path d="M{across:.1f} {top:.1f}V{bottom:.1f}M{across - 4:.1f} {top:.1f}h8'
                f'M{across - 4:.1f} {bottom:.1f}h8" stroke="{colour}"/>'
                f'<circle cx="{across:.1f}" cy="{middle:.1f}" r="3" fill="{colour}"/>'
            )
    legend = "".join(
        f'<tspan x="{_WIDTH - _RIGHT}" dy="13" fill="{colour}">{_text(line.label)}</tspan>'
        for line, colour in zip(lines, itertools.cycle(_COLOURS), strict=False)
        if len(lines) > 1
    )
    parts.append(f'<text y="{_TOP - 14}" font-size="11" text-anchor="end">{legend}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="system-ui, sans-serif" font-size="12">'
        f"{''.join(parts)}</svg>"
    )


def _frame(xs: Iterable[float], ticks: Iterable[float], place, x_title: str, title: str) -> str:
    bottom, xs = _HEIGHT - _BOTTOM, list(xs)
    parts = [f'<text x="{_LEFT}" y="16" font-weight="600">{_text(title)}</text>']
    for tick in ticks:
        y = place(xs[0], tick)[1]
        parts.append(
            f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#e4e8ec"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        )
    for x in xs:
        across = place(x, 0)[0]
        parts.append(
            f'<path d="M{across:.1f} {bottom}v4" stroke="#8a939d"/>'
            f'<text x="{across:.1f}" y="{bottom + 17}" text-anchor="middle">{x:g}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{_WIDTH - _RIGHT}" fill="none" stroke="#8a939d"/>'
    )
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{_text(x_title)}</text>'
    )
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers in a range."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]
