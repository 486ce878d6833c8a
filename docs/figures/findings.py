"""Draws steps.png, settings.png and seconds.png from the tables of docs/findings.md.

Run it again when a table has changed.

pip install -e '.[docs]'
python docs/figures/findings.py
"""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
TEXT = (HERE.parent / "findings.md").read_text(encoding="utf-8")


def table(heading: str, number: int = 0) -> dict[str, dict[str, str]]:
    """A table of a section: {first cell of the row: {column: cell}}; later rows of a name count."""
    section = TEXT.split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    found = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)[number]
    columns, _, *rows = ([c.strip() for c in line.split("|")[1:-1]] for line in found.splitlines())
    return {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in rows}


def value(cell: str) -> tuple[float, float]:
    """'96.5 ± 1.3 %' -> (96.5, 1.3); the error is 0 where none is given."""
    numbers = [float(x.replace(",", "")) for x in re.findall(r"[-+]?[\d,]*\.?\d+", cell)]
    return numbers[0], numbers[1] if "±" in cell else 0.0


def curve(axis, points: dict[float, str], label: str, **style) -> None:
    """Values with their errors over numbers; empty cells are left out."""
    points = {x: value(cell) for x, cell in points.items() if re.search(r"\d", cell)}
    means, errors = zip(*points.values(), strict=True)
    axis.errorbar(list(points), means, errors, label=label, capsize=2, marker=".", **style)


def of_steps(row: dict[str, str]) -> dict[float, str]:
    """The cells of the columns '1 step', '2 steps', ..."""
    return {float(column.split()[0]): x for column, x in row.items() if "step" in column}


def over(axis, numbers, label: str) -> None:
    """A logarithmic axis of a few numbers."""
    axis.set_xscale("log")
    axis.set_xticks(numbers, map(str, numbers))
    axis.minorticks_off()
    axis.set_xlabel(label)


def save(figure, name: str) -> None:
    for axis in figure.axes:
        axis.legend(frameon=False, fontsize=7)
        axis.tick_params(labelsize=8)
        axis.title.set_size(9)
    figure.tight_layout()
    figure.savefig(HERE / name, dpi=80)
    plt.close(figure)


def draw_steps() -> None:
    """Where steps matter: with captions, without, and how many times a model was trained with."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.9))
    for rule, row in table("Do steps matter").items():
        curve(axes[0], of_steps(row), rule)
    axes[0].set(title="shapes with captions", ylabel="everything right (%)", ylim=(0, 102))
    scenes = table("Where nothing is said")["a scene"]
    curve(axes[1], of_steps(scenes), "ordinary, truncation 0.9")
    for number, name in ((1, "truncation"), (2, "rule")):
        for row, cells in table("Where nothing is said", number).items():
            if name == "truncation" and row == "a scene":
                share = {10.0: cells["0.7"]}
                curve(axes[1], share, "truncation 0.7", linestyle="")
            if row in ("purity", "confidence"):
                curve(axes[1], {10.0: cells["a scene"]}, row, linestyle="")
    axes[1].set(title="shapes without captions", ylabel="a scene (%)", ylim=(0, 102))
    for row, cells in table("Steps, truncation", 2).items():
        curve(axes[2], of_steps(cells), f"T = {row}")
    axes[2].set(title="training times T", ylabel="everything right (%)", ylim=(0, 102))
    for axis in axes[:2]:
        over(axis, [1, 2, 4, 10, 25, 100], "steps")
    over(axes[2], [10, 25, 50, 100], "steps")
    save(figure, "steps.png")


def draw_settings() -> None:
    """Guidance and truncation, of the young model and of the packaged one."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.9))
    first, null = table("Steps, truncation"), table("Steps, truncation", 1)
    packaged = table("Does guidance help")
    scales = ("1.5", "2", "3", "5")

    def guided(rows, column, at_one):
        return {1.0: rows[at_one][column]} | {
            float(s): rows[f"guidance {s}"][column] for s in scales
        }

    young = "25 steps, truncation 0.9, no guidance"
    curve(axes[0], guided(first, "right", young), "young model")
    curve(axes[0], guided(null, "empty caption", "no guidance"), "small, empty caption")
    curve(axes[0], guided(null, "learned null", "no guidance"), "small, learned null")
    curve(axes[0], guided(packaged, "right", "25 steps"), "packaged model, people")
    axes[0].set(title="guidance", xlabel="scale", ylabel="right (%)", ylim=(0, 102))
    rates = {"1 (none)": 1.0, "0.86": 0.86, "0.8": 0.8, "0.7": 0.7, "0.5": 0.5}
    cut = {0.9: first[young]["right"]}
    cut |= {rate: first[f"truncation {name}"]["right"] for name, rate in rates.items()}
    curve(axes[1], dict(sorted(cut.items())), "young model, with captions")
    scenes = table("Where nothing is said", 1)["a scene"]
    curve(axes[1], {float(rate): x for rate, x in scenes.items()}, "scenes, 10 steps")
    axes[1].set(title="truncation", xlabel="rate", ylabel="right, or a scene (%)", ylim=(0, 102))
    wrong = table("Replacing codes", 3)
    positions = range(len(wrong))
    for column in ("wrong put right at once (%)", "by a chain (%)", "right spoilt (%)"):
        cells = [row[column] for row in wrong.values()]
        curve(axes[2], dict(zip(positions, cells, strict=True)), column[:-4])
    axes[2].set_xticks(positions, wrong)
    axes[2].set(title="a tenth of the tokens is wrong", xlabel="replace mass", ylabel="tokens (%)")
    save(figure, "settings.png")


def draw_seconds() -> None:
    """Quality over seconds a picture: an autoregressive model, diffusers, and ours."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.9))
    section = TEXT.split("## Beside an autoregressive", 1)[1]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")][1:5]
    for name, kind in (
        ("autoregressive", "autoregressive"),
        ("vqd_jax", "ours, 10, 25, 100 calls"),
    ):
        chosen = [row for row in rows if row[0].strip().startswith(name)]
        curve(axes[0], {value(row[4])[0]: row[2] for row in chosen}, kind)
    axes[0].set(title="shapes, 64 tokens, one core", ylabel="everything right (%)", ylim=(80, 101))
    heading = "How long does a picture take, beside diffusers?"
    for side in ("diffusers", "vqd_jax", "student"):
        found = {k: row for k, row in table(heading, 1).items() if k.startswith(side)}
        times = {value(row["seconds a picture, one"])[0]: row["right"] for row in found.values()}
        steps = ", ".join(name.split(", ")[1] for name in found)
        curve(axes[1], times, f"{side}, {steps} steps")
    axes[1].set(title="packaged model, one core", ylabel="right (%)", ylim=(80, 101))
    chips = TEXT.split("| chip | tokens |", 1)[1].split("\n\n")[0].splitlines()[2:]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in chips]
    for batch in ("1", "16"):
        for column, name in ((3, "autoregressive"), (5, "ours, 25 calls")):
            chosen = [row for row in rows if row[0] == "H100" and row[2] == batch]
            points = {value(row[1])[0]: row[column] for row in chosen}
            curve(axes[2], points, f"{name}, batch of {batch}")
    title = "H100, on paper: lower bounds"
    axes[2].set(title=title, ylabel="ms a picture", yscale="log", ylim=(1, 2e4))
    over(axes[2], [64, 256, 1024], "tokens")
    for axis in axes[:2]:
        over(axis, [0.03, 0.1, 0.3, 1], "seconds a picture")
    save(figure, "seconds.png")


if __name__ == "__main__":
    draw_steps()
    draw_settings()
    draw_seconds()
