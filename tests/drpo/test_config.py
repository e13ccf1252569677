"""Recipes: layers, strictness, messages, help, and saving."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml

from drpo.config import (
    ConfigError,
    Section,
    key,
    load_recipe,
    names_keys,
    refuse,
    replaced,
    save_resolved,
)
from drpo.config_help import help_text, options
from drpo.versions import package_versions


@dataclass(frozen=True)
class Inner(Section):
    """A section inside a section."""

    rate: float = 1.0
    """How fast."""


@dataclass(frozen=True)
class Item(Section):
    """A section of which a recipe has a list."""

    name: str = ""
    """What it is called."""
    paths: list[str] = field(default_factory=list)
    """Where it is."""

    def check(self) -> None:
        refuse(not self.name, "name", "must not be empty")


@dataclass(frozen=True)
class ListRecipe(Section):
    """A recipe with a list of sections."""

    items: list[Item] = field(default_factory=list)
    """The sections."""


@dataclass(frozen=True)
class Part(Section):
    """A section with one field of every kind that recipes use."""

    size: int = 8
    """How many
    of them."""
    half: int = 4
    """At most half of size."""
    kind: Literal["red", "green"] = "red"
    """Which colour."""
    limit: float | None = None
    """null for no limit."""
    names: list[str] = field(default_factory=lambda: ["a"])
    """Some names."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything."""
    inner: Inner = field(default_factory=lambda: Inner(rate=0.7))

    def check(self) -> None:
        rule = f"({self.half}) must be at most half of {key('size')} ({self.size})"
        refuse(2 * self.half > self.size, "half", rule)


@dataclass(frozen=True)
class Recipe(Section):
    """A recipe."""

    run_dir: str = "runs/x"
    """Folder."""
    flag: bool = False
    """Yes or no."""
    section: Part = field(default_factory=Part)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def refusal(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(Recipe, path, overrides)
    return str(caught.value)


# --- layers ---------------------------------------------------------------------------------------------


def test_defaults_then_file_then_overrides(tmp_path):
    path = written(tmp_path, "run_dir: runs/file\nsection:\n  size: 16\n  half: 6\n  inner: {rate: 2.0}\n")
    recipe = load_recipe(Recipe, path, ["section.half=5", "section.inner.rate=3e-4", "section.limit=0.5"])
    assert recipe == Recipe(
        run_dir="runs/file", section=Part(size=16, half=5, limit=0.5, inner=Inner(rate=3e-4))
    )


def test_without_file_and_overrides_the_defaults_of_the_sections_hold():
    recipe = load_recipe(Recipe, None, [])
    assert (recipe.section.inner.rate, recipe.section.names, recipe.section.limit) == (0.7, ["a"], None)


def test_an_empty_file_changes_nothing(tmp_path):
    assert load_recipe(Recipe, written(tmp_path, "# nothing yet\n"), []) == Recipe()


def test_the_last_override_of_a_key_wins():
    assert load_recipe(Recipe, None, ["section.half=1", "section.half=2"]).section.half == 2


def test_lists_and_null_are_replaced_not_merged(tmp_path):
    path = written(tmp_path, "section: {names: [x, y, z], limit: 3.0}\n")
    recipe = load_recipe(Recipe, path, ["section.names=[q]", "section.limit=null"])
    assert recipe.section.names == ["q"]
    assert recipe.section.limit is None


def test_a_value_may_hold_an_equals_sign():
    assert load_recipe(Recipe, None, ["run_dir=runs/beta=1"]).run_dir == "runs/beta=1"


def test_free_mappings_take_any_key():
    recipe = load_recipe(Recipe, None, ["section.extra.depth=3", "section.extra.kind=deep"])
    assert recipe.section.extra == {"depth": 3, "kind": "deep"}


def test_recipes_are_plain_frozen_dataclasses(tmp_path):
    recipe = load_recipe(Recipe, written(tmp_path, "flag: true\n"), [])
    assert (
        type(recipe) is Recipe and type(recipe.section.inner) is Inner and type(recipe.section.names) is list
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.flag = False
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.section.inner.rate = 1.0


# --- refusals -------------------------------------------------------------------------------------------


def test_unknown_top_level_key_is_named_with_its_neighbours(tmp_path):
    for message in (refusal(None, "sction.size=3"), refusal(written(tmp_path, "sction: {size: 3}\n"))):
        assert message.startswith("sction: ")
        assert message.splitlines()[-1] == "known keys there: run_dir, flag, section"


def test_unknown_nested_key_is_named_in_full_with_its_neighbours(tmp_path):
    for message in (
        refusal(None, "section.inner.rte=3"),
        refusal(written(tmp_path, "section:\n  inner:\n    rte: 3\n")),
    ):
        assert message.startswith("section.inner.rte: ")
        assert message.splitlines()[-1] == "known keys there: section.inner.rate"


def test_a_message_about_a_file_names_the_file(tmp_path):
    path = written(tmp_path, "section: {size: many}\n")
    assert str(path) in refusal(path)


@pytest.mark.parametrize(
    "override, key",
    [
        ("section.size=many", "section.size"),
        ("section.size=1.5", "section.size"),
        ("section.size=true", "section.size"),
        ("section.size=null", "section.size"),
        ("section.kind=blue", "section.kind"),
        ("section.limit=low", "section.limit"),
        ("section.inner.rate=[1]", "section.inner.rate"),
        ("section.names=a", "section.names"),
        ("section.names.0=b", "section.names"),
        ("section.extra=3", "section.extra"),
        ("section.extra=[1]", "section.extra"),
        ("section.inner=3", "section.inner"),
        ("section.inner=null", "section.inner"),
        ("section=[1]", "section"),
        ("flag=maybe", "flag"),
        ("run_dir=${nowhere}", "run_dir"),
    ],
)
def test_a_wrong_type_is_refused_naming_the_full_key(override, key):
    assert re.match(rf"{re.escape(key)}[ :]", refusal(None, override))


@pytest.mark.parametrize(
    "items, message",
    [
        ("SFT", "items is a list, written items=[a,b], found 'SFT'"),
        ("[SFT]", "items[0] is a section, found 'SFT'; known keys there: items[0].name, items[0].paths"),
        (
            "[{name: a}, null]",
            "items[1] is a section, found None; known keys there: items[1].name, items[1].paths",
        ),
        ("[{name: a}, {name: b, path: c}]", "items[1].path: Key 'path' not in 'Item'"),
        ("[{name: a, paths: b}]", "items[0].paths is a list, written items[0].paths=[a,b], found 'b'"),
        ("[{name: a, paths: [{b: c}]}]", "items[0].paths[0] must be one value, found {'b': 'c'}"),
        ("[{name: null}]", "items[0].name: "),
        ("[{name: a}, {}]", "items[1].name must not be empty"),
    ],
)
def test_a_list_of_sections_names_the_item_and_its_key(tmp_path, items, message):
    path = written(tmp_path, f"items: {items}\n")
    with pytest.raises(ConfigError) as refused:
        load_recipe(ListRecipe, path, [])
    assert str(refused.value).startswith(message)
    assert "run_dir" not in str(refused.value)


def test_a_list_of_sections_is_read(tmp_path):
    path = written(tmp_path, "items: [{name: a, paths: [x, 1]}, {name: '${items[0].name}'}]\n")
    assert load_recipe(ListRecipe, path, []).items == [Item("a", ["x", "1"]), Item("a")]


def test_a_wrong_choice_lists_the_right_ones():
    assert "'red', 'green'" in refusal(None, "section.kind=blue")


def test_a_section_left_empty_is_refused_with_its_keys(tmp_path):
    message = refusal(written(tmp_path, "section:\n"))
    assert message.startswith("section is a section, found None")
    assert "section.size" in message


def test_an_impossible_combination_names_the_full_keys():
    message = refusal(None, "section.half=5")
    assert message == "section.half (5) must be at most half of section.size (8)"


@pytest.mark.parametrize("override", ["section.size", "=3", ""])
def test_what_is_no_override_is_refused(override):
    assert "section.key=value" in refusal(None, override)


def test_a_missing_recipe_lists_those_that_exist(tmp_path):
    for name in ("b.yaml", "a.yaml", "notes.txt"):
        (tmp_path / name).write_text("")
    message = refusal(tmp_path / "c.yaml")
    assert str(tmp_path / "c.yaml") in message
    assert message.endswith("are: a.yaml, b.yaml")


def test_a_missing_recipe_in_a_missing_folder_says_so(tmp_path):
    assert "no recipe" in refusal(tmp_path / "nowhere" / "c.yaml")


@pytest.mark.parametrize(
    "text", ["section: [1\n", "section: {size: 1\n", "flag: true\nflag: false\n", "a\n\tb: 1"]
)
def test_malformed_yaml_names_the_file(tmp_path, text):
    path = written(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"{path} is not valid YAML")
    assert "line" in message


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "[]\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = written(tmp_path, text)
    assert refusal(path).startswith(f"{path} must hold a mapping")


# --- help -----------------------------------------------------------------------------------------------


def test_options_are_the_leaves_in_order_with_help_and_the_defaults_that_hold():
    found = [(option.key, option.default, option.help) for option in options(Recipe)]
    assert found == [
        ("run_dir", "runs/x", "Folder."),
        ("flag", False, "Yes or no."),
        ("section.size", 8, "How many of them."),
        ("section.half", 4, "At most half of size."),
        ("section.kind", "red", "Which colour."),
        ("section.limit", None, "null for no limit."),
        ("section.names", ["a"], "Some names."),
        ("section.extra", {}, "Anything."),
        ("section.inner.rate", 0.7, "How fast."),
    ]


def test_help_shows_every_key_with_type_default_and_help():
    text = help_text(Recipe, "usage: x.py")
    assert text.startswith("usage: x.py")
    assert "  section.inner.rate  (float; default 0.7)\n      How fast." in text
    assert "  section.limit  (float | None; default null)" in text
    assert "[top level]" in text and "[section.inner]" in text


def test_a_field_without_default_is_shown_as_required():
    @dataclass(frozen=True)
    class Strict(Section):
        path: str
        """Where."""

    assert [(option.key, option.default) for option in options(Strict)] == [("path", "required")]


# --- saving ---------------------------------------------------------------------------------------------


def test_a_saved_recipe_loads_as_the_same_recipe(tmp_path):
    recipe = Recipe(
        run_dir="5",
        flag=True,
        section=Part(limit=1e-7, names=["null", "1"], extra={"a": {"b": [1, None]}}, inner=Inner(3.0)),
    )
    save_resolved(recipe, tmp_path / "config.yaml")
    assert load_recipe(Recipe, tmp_path / "config.yaml", []) == recipe


def test_a_saved_recipe_holds_every_key_and_says_commit_and_versions(tmp_path):
    save_resolved(Recipe(), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert yaml.safe_load(text) == dataclasses.asdict(Recipe())
    header = dict(line[2:].split(": ", 1) for line in text.splitlines() if line.startswith("# "))
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?|unknown", header["git_commit"])
    assert header["torch"] == package_versions()["torch"] != "not installed"
    assert re.fullmatch(r"3\.\d+\.\d+\S*", header["python"])


@pytest.mark.parametrize("word", [".nan", "nan", ".inf", "-.inf", "inf"])
@pytest.mark.parametrize("place", ["inner.rate", "rates[0]", "rates_by_name.a"])
def test_a_number_that_is_none_is_refused_wherever_it_stands(place, word, tmp_path):
    """nan passes every comparison, so that no check of a range would stop it."""

    @dataclass(frozen=True)
    class Numbers(Section):
        inner: Inner = field(default_factory=Inner)
        rates: list[float] = field(default_factory=list)
        rates_by_name: dict[str, Any] = field(default_factory=dict)

    name = place.replace("[0]", "").partition(".")[0]
    value = yaml.safe_load(word)
    if place == "rates_by_name.a" and isinstance(value, str):
        return  # where text may stand, a bare nan is text
    nested = {"inner": {"rate": value}, "rates": [value], "rates_by_name": {"a": value}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({name: nested[name]}))
    with pytest.raises(ConfigError, match=re.escape(place) + " is -?(nan|inf); give a finite number"):
        load_recipe(Numbers, path, [])
    if name == "inner":
        with pytest.raises(ConfigError, match="inner.rate is -?(nan|inf)"):
            load_recipe(Numbers, None, [f"inner.rate={word}"])


# --- keys at run time -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deep(Section):
    inner: Inner = field(default_factory=Inner)
    items: list[Inner] = field(default_factory=list)
    by_name: dict[str, Inner] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer(Section):
    deep: Deep = field(default_factory=Deep)


@names_keys
def key_of_rate(inner: Inner) -> str:
    return key("rate")


def test_a_section_knows_its_full_keys_after_it_was_made():
    recipe = Outer(deep=Deep(items=[Inner(), Inner()], by_name={"a": Inner()}))  # made from the inside out
    assert key_of_rate(recipe.deep.inner) == "deep.inner.rate"
    assert key_of_rate(recipe.deep.items[1]) == "deep.items[1].rate"
    assert key_of_rate(recipe.deep.by_name["a"]) == "deep.by_name.a.rate"
    assert key_of_rate(replaced(recipe.deep.inner, rate=3.0)) == "deep.inner.rate"
    assert key_of_rate(Inner()) == key("rate") == "rate"
    assert recipe == Outer(deep=Deep(items=[Inner(), Inner()], by_name={"a": Inner()}))


@pytest.mark.parametrize("override", ["section.extra.a=???", "section.extra.a.b=???"])
def test_a_missing_value_in_a_mapping_is_refused_with_its_key(override):
    with pytest.raises(
        ConfigError, match=re.escape(override.partition("=")[0]) + ": Missing mandatory value"
    ):
        load_recipe(Recipe, None, [override])


def test_a_retired_key_may_be_null_as_older_recipes_saved_it():
    @dataclass(frozen=True)
    class Newer(Section):
        RETIRED: ClassVar[dict[str, str]] = {"old": "is gone; drop it"}
        rate: float = 1.0

    assert load_recipe(Newer, None, ["old=null"]) == Newer()
    with pytest.raises(ConfigError, match="^old is gone; drop it$"):
        load_recipe(Newer, None, ["old=3"])
