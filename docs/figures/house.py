"""Draws the rooms of vqd_jax and the imports between them: house.png beside this file.

pip install -e '.[docs]'
python docs/figures/house.py
python docs/figures/house.py --lines

With ``--lines`` it prints the lines of code of every room instead, without docstrings and comments.

The drawing is read off the source; tests/test_house.py uses the same reading to keep the imports
going down.
"""

import ast
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "vqd_jax"

# From the top floor to the ground. A room is a folder or a module right below vqd_jax. An import
# goes to a lower floor or stays in its room.
FLOORS = (
    ("main",),
    ("modes",),
    ("bulk",),
    ("web",),
    ("training",),
    ("evaluation",),
    ("pipeline",),
    ("compiled",),
    ("generation",),
    ("request",),
    ("interop",),
    ("data",),
    ("checkpoint",),
    ("parallel",),
    ("config",),
    ("options",),
    ("diffusion", "models"),
    ("files",),
    ("console",),
    ("errors",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


class Import(NamedTuple):
    """One import of a module of the package by another: dotted names without the package's."""

    module: str
    imported: str
    line: int


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name without the package's -> file, of all modules; packages by their own name."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


def imports(root: Path = ROOT) -> list[Import]:
    """Every import between modules of the package, those inside functions included."""
    known = modules(root)
    found = []
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for imported in _imported(node, known):
                found.append(Import(name, imported, node.lineno))
    return found


def _imported(node: ast.AST, known: dict[str, Path]) -> list[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return []
    inside = [n.removeprefix(PACKAGE).lstrip(".") for n in names if n.split(".")[0] == PACKAGE]
    # A name that is no module is something in a module.
    return [n if n in known else n.rpartition(".")[0] for n in inside]


def room(module: str) -> str:
    """The room of a module: the first part of its dotted name."""
    return module.split(".")[0]


def lines_of_code(path: Path) -> int:
    """Lines of a file that are neither blank, nor comment, nor docstring."""
    text = path.read_text(encoding="utf-8")
    silent = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            silent |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(
        bool(line.strip()) and not line.lstrip().startswith("#")
        for number, line in enumerate(text.splitlines(), 1)
        if number not in silent
    )


def without_shortcuts(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that no chain of other arrows implies; there are no circles."""
    below = {}

    def reach(start):
        if start not in below:
            ends = {end for begin, end in arrows if begin == start}
            below[start] = ends.union(*map(reach, ends))
        return below[start]

    return {
        (start, end)
        for start, end in arrows
        if not any(end in reach(middle) for begin, middle in arrows if begin == start)
    }


def lines_of_rooms(root: Path = ROOT) -> dict[str, int]:
    """Lines of code of every room, from the top floor down; the package's own file is ''."""
    lines = dict.fromkeys([*FLOOR_OF, ""], 0)
    for name, path in modules(root).items():
        lines[room(name)] += lines_of_code(path)
    return lines


def draw(target: Path) -> None:
    """Writes the drawing as a PNG."""
    import matplotlib.pyplot as plt

    sizes, inside = lines_of_rooms(), {name: [] for name in FLOOR_OF}
    for name in modules():
        if name.count(".") == 1:
            inside[room(name)].append(name.split(".")[-1])
    floors = [[r for r in rooms if sizes[r]] for rooms in FLOORS]
    floors = [rooms for rooms in floors if rooms]
    place = {}
    for height, rooms in enumerate(reversed(floors)):
        for column, name in enumerate(rooms):
            # Rooms step to the side, so that arrows do not run through them.
            side = (-1) ** height if len(rooms) == 1 else 2 * column - 1
            place[name] = (1.3 * side, height)
    figure, axes = plt.subplots(figsize=(9, 0.8 * len(floors)))
    boxes = {}
    for name, (x, y) in place.items():
        box = {"boxstyle": "round,pad=0.5", "facecolor": "#e8f0fb", "edgecolor": "#3b6ea5"}
        names = textwrap.fill(", ".join(sorted(inside[name])), 46)
        label = "\n".join(filter(None, [f"{name}  ({sizes[name]:,})", names]))
        text = axes.text(x, y, label, ha="center", va="center", fontsize=8, bbox=box, zorder=2)
        boxes[name] = text.get_bbox_patch()
    figure.canvas.draw()
    arrows = {(room(i.module), room(i.imported)) for i in imports()}
    arrows = {(a, b) for a, b in arrows if FLOOR_OF.get(a, 99) < FLOOR_OF.get(b, -1)}
    for start, end in sorted(without_shortcuts(arrows)):
        down = place[start][1] - place[end][1]
        # A long arrow bends less, or it would leave the drawing.
        bend = min(0.4, 3.75 / down) if place[start][0] == place[end][0] and down > 2 else 0
        arrow = {"arrowstyle": "-|>", "color": "0.45", "mutation_scale": 14, "patchA": boxes[start]}
        arrow |= {"patchB": boxes[end], "connectionstyle": f"arc3,rad={bend}"}
        axes.annotate("", place[end], place[start], arrowprops=arrow, zorder=3)
    axes.set(xlim=(-2.9, 2.9), ylim=(-0.6, len(floors) - 0.4))
    axes.axis("off")
    figure.savefig(target, dpi=90, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    if "--lines" in sys.argv[1:]:
        found = lines_of_rooms()
        for name, count in found.items():
            print(f"{count:7,}  {name or PACKAGE}")
        print(f"{sum(found.values()):7,}  together")
    else:
        draw(Path(__file__).with_name("house.png"))
