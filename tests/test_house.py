"""The house: imports go down, names are apart, files and functions are short."""

import ast
import importlib.util
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_SPEC = importlib.util.spec_from_file_location("house", ROOT / "docs" / "figures" / "house.py")
house = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(house)

MODULES = house.modules()
IMPORTS = house.imports()


def test_every_module_is_in_a_room():
    rooms = {house.room(name) for name in MODULES} - {""}
    assert rooms <= house.FLOOR_OF.keys()


def test_imports_go_down():
    up = [
        f"{i.module}:{i.line} imports {i.imported}"
        for i in IMPORTS
        # The package itself hands out the pipeline, when it is asked for.
        if i.module
        and house.room(i.module) != house.room(i.imported)
        and house.FLOOR_OF[house.room(i.imported)] <= house.FLOOR_OF[house.room(i.module)]
    ]
    assert not up, "\n".join(up)


def test_no_modules_import_each_other():
    graph = {name: set() for name in MODULES}
    for i in IMPORTS:
        if i.module:
            graph[i.module].add(i.imported)

    def reachable(start):
        seen, waiting = set(), [start]
        while waiting:
            for following in graph[waiting.pop()] - seen:
                seen.add(following)
                waiting.append(following)
        return seen

    circles = [name for name in MODULES if name and name in reachable(name)]
    assert not circles


def test_no_two_modules_share_a_name():
    stems = Counter(name.split(".")[-1] for name in MODULES if name)
    assert [stem for stem, count in stems.items() if count > 1] == []
    assert [stem for stem in stems if f"{stem}s" in stems] == []


def _functions(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_are_short(name):
    path = MODULES[name]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
    assert [(function, size) for function, size in _functions(path) if size > 60] == []


@pytest.mark.parametrize(
    ("package", "importers"),
    [
        # JAX has no public name for what this one takes from there.
        ("jax._src", {"parallel.processes"}),
        ("orbax", {"checkpoint"}),
        ("tensorflow", set()),
        ("torch", {"interop.published"}),
    ],
)
def test_only_one_module_touches(package, importers):
    found = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            if any(n == package or n.startswith(f"{package}.") for n in names):
                found.add(name)
    assert found == importers
