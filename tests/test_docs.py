"""The pages name files that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md")])
ROOMS = {path.name for path in ROOT.iterdir() if path.is_dir()}
ROOMS |= {path.name for path in (ROOT / "vqd_jax").iterdir() if path.is_dir()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    """Paths of this repository or below vqd_jax/; a name with my_ is the reader's own."""
    text = page.read_text(encoding="utf-8")
    found = set(re.findall(r"(?<![\w/.<{=])((?:\w+/)+\w+\.(?:py|md|sh|yaml))\b", text))
    ours = {path for path in found if path.split("/")[0] in ROOMS and "/my_" not in path}
    missing = [
        path for path in ours if not ((ROOT / path).exists() or (ROOT / "vqd_jax" / path).exists())
    ]
    assert missing == [] and (ours or page.name != "README.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_modules_exist(page):
    """Files that are named without their folder, as in a list of several of one folder."""
    named = set(re.findall(r"`(\w+\.py)`", page.read_text(encoding="utf-8")))
    there = {path.name for path in (ROOT / "vqd_jax").rglob("*.py")}
    there |= {path.name for room in ("configs", "benchmarks") for path in (ROOT / room).iterdir()}
    assert sorted(named - there) == []
