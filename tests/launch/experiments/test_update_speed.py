"""The benchmark of micro-batch shapes: its inputs, one measurement, and what it refuses to compare."""

from __future__ import annotations

import json

import pytest

from drpo.config import ConfigError
from drpo.models.tokenizer import load_tokenizer
from launch.experiments.update_speed import UpdateSpeedRecipe, compare, make_inputs, measure

TINY = {
    "hidden_size": 16,
    "num_layers": 1,
    "prompt_length": 8,
    "response_length": 4,
    "batch_size": 8,
    "num_epochs": 1,
    "num_threads": 1,
}


def side(seconds: float, peak_gib: float, value_loss: float = 2.0) -> dict[str, float]:
    return {"seconds": seconds, "peak_gib": peak_gib, "value_loss": value_loss}


def test_inputs_have_the_lengths_asked_for_and_a_run_takes_them(tmp_path):
    recipe = UpdateSpeedRecipe(**TINY)
    make_inputs(recipe, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path / "policy"))

    def lengths(name: str) -> list[int]:
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        return [len(tokenizer(row["prompt"]).input_ids) for row in rows]

    assert min(lengths("even")) >= 8  # the run truncates to 8
    uneven = lengths("uneven")
    assert min(uneven) < 8 < 24 < max(uneven)
    measured = measure(recipe, tmp_path, "shared", "now", 0)
    assert measured["seconds"] > 0 and measured["peak_gib"] > 0
    settings = (tmp_path / "shared_now_0" / "config.yaml").read_text()
    assert "rollouts_per_prompt: 4" in settings and "share_prompts: true" in settings


def test_ratios_are_of_one_round_and_medians_of_all():
    before, now = (
        [side(8.0, 2.0), side(9.0, 2.0), side(6.0, 4.0)],
        [side(2.0, 1.0), side(3.0, 2.0), side(3.0, 1.0)],
    )
    row = compare("even", before, now)
    assert (row["before"], row["now"]) == (8.0, 3.0)
    assert row["faster"] == [4.0, 3.0, 2.0] and row["memory"] == [0.5, 1.0, 0.25]


def test_sides_with_different_losses_are_not_compared():
    with pytest.raises(ConfigError, match=r"^even: the value losses are \[2.0, 2.1\]"):
        compare("even", [side(1.0, 1.0)], [side(1.0, 1.0, 2.1)])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cases": ["odd"]}, "cases must be some of even"),
        ({"batch_size": 10}, r"batch_size \(10\) must be a multiple"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        UpdateSpeedRecipe(**changes)
