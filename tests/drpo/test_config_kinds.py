"""Settings that are given as Python objects are of the kind that a recipe file would need."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from drpo import OnlineRecipe
from drpo.config import ConfigError
from drpo.config_kinds import is_of_kind, kind_text
from drpo.rollout.resets import ResetConfig
from drpo.trainers.credit import AdvantageConfig
from drpo.trainers.ppo_update import PPOConfig


@pytest.mark.parametrize(
    "hint, allowed, refused",
    [
        (int, [3, np.int64(3)], [3.0, 1.5, "3", None, True]),
        (float, [3, 0.5, np.float32(0.5)], ["0.5", None, True]),
        (bool, [True, False], [1, 0, "yes", None]),
        (str, ["a", "", Path("a")], [1, None, ["a"]]),
        (float | None, [0.5, None], ["0.5"]),
        (Literal["a", "b"], ["a"], ["A", "c", None]),
        (Literal[1, 2], [1], [True, "1", 3]),
        (list[int], [[1], (), []], [[1.5], 1, "1", None]),
        (dict[str, list[str]], [{"a": ["b"]}, {}], [{"a": "b"}, ["a"]]),
        (ResetConfig, [1, "whatever is checked elsewhere"], []),
    ],
)
def test_kinds(hint, allowed, refused):
    assert all(is_of_kind(value, hint) for value in allowed)
    assert not any(is_of_kind(value, hint) for value in refused)


def test_kinds_in_words():
    assert kind_text(float | None) == "a number or null"
    assert kind_text(Literal["a", "b"] | None) == "one of a, b or null"
    assert kind_text(dict[str, list[int]]) == (
        "a mapping whose items are each a list whose items are each a whole number"
    )


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
