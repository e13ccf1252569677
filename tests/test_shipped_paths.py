"""What is shipped works from any checkout: no recipe and no page names a path outside the project."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "launch" / "recipes").rglob("*.yaml"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)#\s]*)[^)]*\)")
OUTSIDE = re.compile(r"(?<![\w.])\.\./|(?<![\w.~/:])~/|(?<![\w./}])/(home|root|tmp|work|data|mnt)/")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def texts(node: Any) -> Iterator[str]:
    """Every text in a parsed recipe."""
    match node:
        case str():
            yield node
        case dict():
            for key, value in node.items():
                yield from texts([key, value])
        case list():
            for value in node:
                yield from texts(value)


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_a_recipe_names_nothing_outside_the_project(recipe):
    content = recipe.read_text(encoding="utf-8")
    assert not OUTSIDE.search(content)
    assert not [text for text in texts(yaml.safe_load(content)) if text.startswith(("..", "/", "~"))]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_names_nothing_outside_the_project(page):
    content = page.read_text(encoding="utf-8")
    assert not OUTSIDE.search(LINK.sub("", content))
    for target in LINK.findall(content):
        if target and "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).resolve().is_relative_to(ROOT)


@pytest.mark.parametrize("text", ["../shared/x.jsonl", "path=../x", "a ~/x", "see /tmp/x", "`../x`"])
def test_the_check_sees_paths_outside(text):
    assert OUTSIDE.search(text)


@pytest.mark.parametrize("text", ["runs/data/x", "https://hub.co/data/x", "and/or", "train ... test"])
def test_the_check_passes_paths_inside(text):
    assert not OUTSIDE.search(text)
