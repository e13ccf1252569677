"""Settings that are given as Python objects are of the kind that a recipe file would need."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from drpo import OnlineRecipe
from drpo.config import ConfigError, load_recipe, save_resolved
from drpo.config_kinds import as_kind, kind_text
from drpo.rollout.generator import RolloutConfig
from drpo.rollout.resets import ResetConfig
from drpo.trainers.credit import AdvantageConfig, ShapingConfig
from drpo.trainers.ppo_update import PPOConfig


@pytest.mark.parametrize(
    "hint, given, taken",
    [
        (int, np.int64(3), 3),
        (float, 3, 3),
        (float, np.float32(0.5), 0.5),
        (bool, False, False),
        (str, Path("a/b"), "a/b"),
        (str, "", ""),
        (float | None, None, None),
        (Literal["a", "b"], np.str_("a"), "a"),
        (list[int], (np.int64(1), 2), [1, 2]),
        (list[str] | None, (), []),
        (dict[str, list[str]], {"a": ("b",)}, {"a": ["b"]}),
        (dict[str, Any], {"a": (1,)}, {"a": (1,)}),
        (ResetConfig, "is checked elsewhere", "is checked elsewhere"),
    ],
)
def test_a_value_becomes_what_a_file_would_give(hint, given, taken):
    found = as_kind(given, hint)
    assert found == taken and type(found) is type(taken)


@pytest.mark.parametrize(
    "hint, refused",
    [
        (int, [3.0, 1.5, "3", None, True]),
        (float, ["0.5", None, True]),
        (bool, [1, 0, "yes", None]),
        (str, [1, None, ["a"]]),
        (float | None, ["0.5"]),
        (Literal["a", "b"], ["A", "c", None]),
        (Literal[1, 2], [True, "1", 3]),
        (list[int], [[1.5], 1, "1", None]),
        (dict[str, list[str]], [{"a": "b"}, ["a"]]),
    ],
)
def test_values_of_another_kind_are_refused(hint, refused):
    for value in refused:
        with pytest.raises(TypeError):
            as_kind(value, hint)


def test_a_recipe_of_python_values_is_saved_as_one_of_a_file(tmp_path):
    recipe = OnlineRecipe(
        run_dir=Path("runs/x"),
        num_steps=np.int64(3),
        rollout=RolloutConfig(batch_size=np.int64(64), bad_tokens=()),
    )
    assert recipe == OnlineRecipe(run_dir="runs/x", num_steps=3, rollout={"batch_size": 64})
    save_resolved(recipe, tmp_path / "config.yaml")
    assert load_recipe(OnlineRecipe, tmp_path / "config.yaml", []) == recipe
    with pytest.raises(ConfigError, match="length_penalty is nan"):
        ShapingConfig(length_penalty=np.float32("nan"))


def test_kinds_in_words():
    assert kind_text(float | None) == "a number or null"
    assert kind_text(Literal["a", "b"] | None) == "one of a, b or null"
    assert kind_text(dict[str, list[int]]) == (
        "a mapping whose items are each a list whose items are each a whole number"
    )
    assert kind_text(dict[str, Any]) == "a mapping"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ResetConfig(length="unifrom"), "length must be one of uniform, "),
        (lambda: ResetConfig(proportion=None), "proportion must be a number, got None"),
        (lambda: ResetConfig(proportion="0.5"), "proportion must be a number, got '0.5'"),
        (lambda: ResetConfig(min_length=1.5), "min_length must be a whole number, got 1.5"),
        (lambda: AdvantageConfig(estimator="grp"), "estimator must be one of gae, rloo, grpo, "),
        (lambda: AdvantageConfig(whiten=1), "whiten must be true or false, got 1"),
        (lambda: PPOConfig(clip_range="0.2"), "clip_range must be a number, got '0.2'"),
        (lambda: OnlineRecipe(num_steps="3"), "num_steps must be a whole number, got '3'"),
        (
            lambda: dataclasses.replace(OnlineRecipe().reset, masking="Paper"),
            "masking must be one of paper, release, got 'Paper'",
        ),
    ],
)
def test_a_slip_in_python_is_refused_as_in_a_file(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()
