"""Every section of every recipe: bounds hold and are shown, errors carry the full key, mappings make sections."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml
from shipped_recipes import STAGES

from drpo.config import ConfigError, Section, load_recipe
from drpo.config_help import help_text, options
from drpo.rollout.generator import RolloutConfig
from drpo.rollout.sampler import SamplingConfig
from drpo.trainers.online_recipe import OnlineRecipe
from drpo.trainers.preference.recipe import PreferenceRecipe
from eval.comparing.recipe import CompareRecipe, SystemConfig
from launch.experiments.preference import PreferenceExperimentRecipe, TableConfig
from reward_models.train import RewardModelRecipe

RECIPES = sorted(set(STAGES.values()), key=lambda recipe: recipe.__name__)


def fields_of(section: type, place: str = "", around: tuple = ()) -> Iterator[tuple]:
    """Section, field, full key, and the names and list indices that lead to it, for all settings at any depth."""
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        yield section, field, f"{place}{field.name}", (*around, field.name)
        for kind in (hints[field.name], *get_args(hints[field.name])):
            if dataclasses.is_dataclass(kind):
                step = {list: "[0]", dict: ".a"}.get(get_origin(hints[field.name]), "")
                inner = {"[0]": (0,), ".a": ("a",), "": ()}[step]
                yield from fields_of(kind, f"{place}{field.name}{step}.", (*around, field.name, *inner))


def just_outside(bounds: dict[str, float], kind: Any) -> list[float]:
    """The values next to each limit that the bounds exclude."""
    number = int if int in (kind, *get_args(kind)) else float
    below = (lambda x: x - 1) if number is int else (lambda x: math.nextafter(x, -math.inf))
    above = (lambda x: x + 1) if number is int else (lambda x: math.nextafter(x, math.inf))
    outside = {">=": below, "<=": above, ">": number, "<": number}
    return [outside[sign](number(limit)) for sign, limit in bounds.items()]


def nested(steps: tuple, value: Any) -> Any:
    for step in reversed(steps):
        value = [value] if step == 0 else {step: value}
    return value


def violations() -> Iterator[Any]:
    """Recipe, full key, steps, value: each side of each bound, once where recipes share a section at the same key."""
    seen = set()
    for recipe in RECIPES:
        for section, field, key, steps in fields_of(recipe):
            bounds = field.metadata.get("bounds")
            owner = next(
                c for c in reversed(section.__mro__) if field.name in vars(c).get("__annotations__", {})
            )
            if bounds is None or (owner, key) in seen:
                continue
            seen.add((owner, key))
            for value in just_outside(bounds, get_type_hints(section)[field.name]):
                yield pytest.param(recipe, key, steps, value, id=f"{recipe.__name__}-{key}={value}")


@pytest.mark.parametrize("recipe, key, steps, value", violations())
def test_a_number_out_of_bounds_is_refused_by_its_full_key(recipe, key, steps, value, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(nested(steps, value)))
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, path, [])
    assert str(caught.value).startswith(f"{key} must be ")
    assert str(caught.value).endswith(f", got {value}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_all_of_a_recipe_is_sections_that_leave_their_making_to_the_base(recipe):
    sections = {section for section, *_ in fields_of(recipe)}
    assert all(issubclass(s, Section) and s.__post_init__ is Section.__post_init__ for s in sections)


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_shows_all_bounds(recipe):
    page = help_text(recipe, "usage")
    for option in options(recipe):
        assert f"  {option.key}  ({option.type}{' ' * bool(option.bounds)}{option.bounds}; default " in page


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_opens_each_section_once_its_own_keys_first(recipe):
    sections = {}
    for part in help_text(recipe, "usage").split("\n\n[")[1:]:
        name, _, body = part.partition("]\n")
        assert name not in sections and not any(other.startswith(f"{name}.") for other in sections)
        sections[name] = re.findall(r"^  (\S+)  \(", body, re.MULTILINE)
    assert sorted(key for keys in sections.values() for key in keys) == sorted(o.key for o in options(recipe))
    for name, keys in sections.items():
        assert {key.rpartition(".")[0] or "top level" for key in keys} == {name}


def test_help_shows_bounds_beside_the_type():
    page = help_text(OnlineRecipe, "usage")
    assert "  rollout.batch_size  (int >= 1; default 512)\n" in page
    assert "  rollout.sampling.top_p  (float > 0 and <= 1; default 1.0)\n" in page
    assert "  kl.max_per_token  (float | None > 0; default null)\n" in page


@pytest.mark.parametrize(
    "recipe, values, message",
    [
        (OnlineRecipe, {"rollout": {"batch_size": 0}}, "rollout.batch_size must be >= 1, got 0"),
        (OnlineRecipe, {"rollout": {"sampling": {"top_k": 5}}}, "rollout.sampling.top_k must be 0, got 5: "),
        (OnlineRecipe, {"kl": {"horizon": 5}}, "kl.horizon does nothing without kl.target_per_token; "),
        (OnlineRecipe, {"kl": {"max_per_token": 0}}, "kl.max_per_token must be > 0 or null, got 0"),
        (PreferenceRecipe, {"loss": {"offset": {"alpha": -1}}}, "loss.offset.alpha must be >= 0, got -1"),
        (
            PreferenceRecipe,
            {"loss": {"name": "cdpo"}},
            "loss.label_smoothing must be given for loss.name=cdpo",
        ),
        (
            RewardModelRecipe,
            {"references": {"task": "own"}},
            "references.path must name the data for references.task=own, got None",
        ),
        (
            CompareRecipe,
            {"complete": {"num_responses": 2}},
            "complete.num_responses must be 1 for complete.sampling.temperature=0",
        ),
        (
            CompareRecipe,
            {"complete": {"sampling": {"temperature": -1}}},
            "complete.sampling.temperature must be >= 0, got -1",
        ),
        (
            CompareRecipe,
            {"complete": {"data": {"demo": {"num_needed": 13}}}},
            "complete.data.demo.num_needed (13) must be <= complete.data.demo.num_items (12)",
        ),
        (
            CompareRecipe,
            {"judging": {"judge": {"temperature": 3}}},
            "judging.judge.temperature must be >= 0 and <= 2 or null, got 3",
        ),
        (
            CompareRecipe,
            {"judging": {"judge": {"kind": "function", "model": "m"}}},
            "judging.judge.model does not apply to judging.judge.kind=function",
        ),
        (CompareRecipe, {"judging": {"orders": "one", "half_tie": "tie"}}, "judging.half_tie does not apply"),
        (
            CompareRecipe,
            {"systems": [{"name": "a", "policies": ["p"]}, {"name": "b"}]},
            "systems[1].policies or systems[1].completions must be given, and not both",
        ),
        (
            PreferenceExperimentRecipe,
            {"tables": {"t": {"seeds": [0], "methods": {"dpo": []}}}},
            "tables.t.seeds must be two or more",
        ),
    ],
)
def test_an_error_begins_with_the_full_key_from_a_file_and_from_python(recipe, values, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    for make in (lambda: load_recipe(recipe, path, []), lambda: recipe(**values)):
        with pytest.raises(ConfigError) as caught:
            make()
        assert str(caught.value).startswith(message)


def test_python_takes_mappings_for_sections_as_a_file_does():
    recipe = OnlineRecipe(rollout={"batch_size": 8, "sampling": {"temperature": 0.5}})
    assert recipe == load_recipe(
        OnlineRecipe, None, ["rollout.batch_size=8", "rollout.sampling.temperature=0.5"]
    )
    assert recipe.rollout == RolloutConfig(batch_size=8, sampling=SamplingConfig(temperature=0.5))


def test_a_mapping_keeps_the_defaults_of_the_section_that_it_is_in():
    assert RolloutConfig(sampling={}).sampling == SamplingConfig(temperature=0.7)
    assert OnlineRecipe(rollout={"sampling": {"top_p": 1.0}}).rollout.sampling.temperature == 0.7


def test_lists_and_mappings_of_sections_take_mappings_beside_sections():
    system = SystemConfig(name="a", policies=["p"])
    recipe = CompareRecipe(systems=[system, {"name": "b", "completions": ["f"]}])
    assert recipe.systems == [system, SystemConfig(name="b", completions=["f"])]
    recipe = PreferenceExperimentRecipe(tables={"t": {"methods": {"dpo": ["loss.beta=1"]}}})
    assert recipe.tables == {"t": TableConfig(methods={"dpo": ["loss.beta=1"]})}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: OnlineRecipe(rollout={"batch": 8}), "rollout.batch: "),
        (lambda: OnlineRecipe(rollout={"batch_size": "many"}), "rollout.batch_size: "),
        (lambda: OnlineRecipe(rollout={"sampling": {"top": 1}}), "rollout.sampling.top: "),
        (lambda: OnlineRecipe(rollout={"bad_tokens": "a"}), "rollout.bad_tokens is a list, "),
        (lambda: OnlineRecipe(rollout={"sampling": 1}), "rollout.sampling is a section, found 1; "),
        (lambda: OnlineRecipe(rollout=8), "rollout is a section, found 8; "),
        (lambda: OnlineRecipe(kl={"target": 6}), "kl.target was a KL per episode"),
        (lambda: CompareRecipe(systems=[{"nme": "a"}]), "systems[0].nme: "),
        (lambda: CompareRecipe(systems=["a"]), "systems[0] is a section, found 'a'; "),
        (
            lambda: CompareRecipe(systems={"name": "a"}),
            "systems must be a list of sections, got {'name': 'a'}",
        ),
    ],
)
def test_a_mapping_in_python_is_checked_as_strictly_as_a_file(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_an_unknown_key_of_a_mapping_shows_the_known_ones_in_full():
    with pytest.raises(ConfigError) as caught:
        OnlineRecipe(rollout={"sampling": {"top": 1}})
    known = "rollout.sampling.temperature, rollout.sampling.top_k, rollout.sampling.top_p"
    assert str(caught.value).splitlines()[-1] == f"known keys there: {known}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_python_refuses_numbers_that_are_not_finite(value):
    with pytest.raises(ConfigError, match=f"^temperature is {value}; give a finite number"):
        SamplingConfig(temperature=value)
    with pytest.raises(ConfigError, match=f"^rollout.sampling.temperature is {value}; give a finite number"):
        OnlineRecipe(rollout={"sampling": {"temperature": value}})
