"""Words of a recipe that YAML reads as truth values or numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from drpo.config import ConfigError, load_recipe


@dataclass(frozen=True)
class Row:
    name: str = ""
    paths: list[str] = field(default_factory=list)
    size: float | None = None


@dataclass(frozen=True)
class Words:
    name: str = "x"
    choice: Literal["no", "yes", "off"] | None = None
    maybe: str | None = "x"
    flag: bool = True
    size: int = 1
    rate: float = 1.0
    names: list[str] = field(default_factory=list)
    table: dict[str, str] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    row: Row = field(default_factory=Row)
    anything: dict[str, Any] = field(default_factory=dict)


def both_ways(tmp_path: Path, key: str, value: str) -> list[Words]:
    """The recipe with `key` given on the command line, and with it in a file."""
    path = tmp_path / "recipe.yaml"
    *sections, name = key.split(".")
    path.write_text("".join(f"{s}: {{" for s in sections) + f"{name}: {value}" + "}" * len(sections) + "\n")
    return [load_recipe(Words, None, [f"{key}={value}"]), load_recipe(Words, path, [])]


@pytest.mark.parametrize("word", ["no", "yes", "off"])
def test_a_choice_may_be_a_word_of_truth(tmp_path, word):
    assert [recipe.choice for recipe in both_ways(tmp_path, "choice", word)] == [word, word]


@pytest.mark.parametrize("word", ["No", "on", "false", "n"])
def test_another_word_of_truth_is_refused_as_it_was_written(tmp_path, word):
    with pytest.raises(ConfigError, match=f"choice.*'{word}'"):
        load_recipe(Words, None, [f"choice={word}"])


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "On",
        "true",
        "007",
        "1.10",
        "1e3",
        "0x10",
        "1_000",
        "12:30",
        "2026-11-27",
        ".5",
        "it's",
        "=",
        "a#b",
    ],
)
def test_text_keeps_its_spelling(tmp_path, text):
    for recipe in both_ways(tmp_path, "name", text):
        assert recipe.name == text
    for recipe in both_ways(tmp_path, "maybe", text):
        assert recipe.maybe == text
    for recipe in both_ways(tmp_path, "row.name", text):
        assert recipe.row.name == text


@pytest.mark.parametrize("null", ["null", "~", "NULL", ""])
def test_null_stays_null(tmp_path, null):
    assert [recipe.maybe for recipe in both_ways(tmp_path, "maybe", null)] == [None, None]
    with pytest.raises(ConfigError, match="^name: "):
        load_recipe(Words, None, [f"name={null}"])


def test_quotes_and_comments_are_left_alone(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: 'null'  # no\nmaybe: \"007\"\nchoice: no  # off\n")
    recipe = load_recipe(Words, path, [])
    assert (recipe.name, recipe.maybe, recipe.choice) == ("null", "007", "no")


def test_words_are_kept_inside_lists_mappings_and_sections(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "names: [no, 1.10]\n"
        "table: {on: off, 1: 2.50}\n"
        "lists:\n  5%: []\n  010:\n    - yes\n    - 0x1\n"
        "rows: [{name: no, paths: [1.0], size: 1.0}]\n"
    )
    given = ["names=[no,1.10]", "table={on: off, 1: 2.50}", "lists={5%: [], 010: [yes, 0x1]}"]
    for recipe in (
        load_recipe(Words, path, []),
        load_recipe(Words, None, [*given, "rows=[{name: no, paths: [1.0], size: 1.0}]"]),
    ):
        assert recipe.names == ["no", "1.10"]
        assert recipe.table == {"on": "off", "1": "2.50"}
        assert recipe.lists == {"5%": [], "010": ["yes", "0x1"]}
        assert recipe.rows == [Row("no", ["1.0"], 1.0)]
    assert load_recipe(Words, None, ["table.a=no", "row.name=off"]).table == {"a": "no"}


def test_aliases_and_merged_sections_are_kept_too(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "names: &names [no, &word on]\nname: *word\nlists: {a: *names, b: *names}\n"
        "rows:\n  - &row {name: 1.0, paths: [yes]}\n  - {<<: *row, size: 2}\n"
    )
    recipe = load_recipe(Words, path, [])
    assert (recipe.names, recipe.name) == (["no", "on"], "on")
    assert recipe.lists == {"a": ["no", "on"], "b": ["no", "on"]}
    assert recipe.rows == [Row("1.0", ["yes"]), Row("1.0", ["yes"], 2.0)]


def test_truth_values_numbers_and_free_mappings_are_what_yaml_says(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("flag: off\nsize: 3\nrate: 1e-3\nanything: {a: no, b: 1.10}\n")
    recipe = load_recipe(Words, path, [])
    assert (recipe.flag, recipe.size, recipe.rate) == (False, 3, 1e-3)
    assert recipe.anything == {"a": False, "b": 1.1}


def test_text_over_several_lines_is_text(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: no\n  and yes\nmaybe: |\n  no\n")
    recipe = load_recipe(Words, path, [])
    assert (recipe.name, recipe.maybe) == ("no and yes", "no\n")


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(ConfigError, match="recipe.yaml is not valid YAML"):
        load_recipe(Words, path, [])
