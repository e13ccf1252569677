"""The benchmark of rollouts: one measurement of the native engine, and the table."""

from __future__ import annotations

import importlib.util
import json

import pytest

from drpo.config import ConfigError
from launch.experiments.flops import Shape
from launch.experiments.rollout_speed import RolloutSpeedRecipe, compare, markdown, measure, run
from launch.experiments.speed_inputs import make_models, make_texts

TINY = {
    "hidden_size": 32,
    "num_layers": 1,
    "vocab_size": 300,
    "prompt_length": 8,
    "response_length": 4,
    "batch_size": 3,
    "num_batches": 2,
}


@pytest.mark.parametrize("lengths", ["even", "tldr"])
def test_the_native_engine_is_measured_and_agrees_with_itself(tmp_path, lengths):
    recipe = RolloutSpeedRecipe(**TINY, lengths=lengths)
    make_models(tmp_path, Shape(32, 1, 128, 300), 1, recipe.max_tokens, 0)
    make_texts(tmp_path, 300, 8, 4, 3, 0)
    measured = json.loads(measure(recipe, tmp_path, "native").read_text())
    assert measured["tokens_per_second"] > 0 and measured["difference"] < 1e-5


def test_ratios_are_of_one_round_and_medians_of_all():
    native, vllm = (
        [{"tokens_per_second": rate, "difference": d} for rate, d in zip(rates, (1e-7, 3e-6, 2e-6), strict=True)]
        for rates in ((100.0, 200.0, 400.0), (300.0, 400.0, 600.0))
    )  # fmt: skip
    found = compare(native, vllm)
    assert found == {"native": 200.0, "vllm": 400.0, "faster": [3.0, 2.0, 1.5], "difference": 3e-6}
    assert "| 200 | 400 | 2.00 (1.50 to 3.00) | 3.0e-06 |" in markdown(found)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_nothing_is_measured(tmp_path):
    with pytest.raises(ConfigError, match="rollout.engine=vllm needs the package vllm"):
        run(RolloutSpeedRecipe(**TINY, run_dir=str(tmp_path)))
