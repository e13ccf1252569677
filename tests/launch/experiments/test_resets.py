from __future__ import annotations

import pytest

from drpo.config import ConfigError, load_recipe
from launch.experiments.resets import ExperimentRecipe, markdown


def test_the_table_has_a_row_a_setting_and_no_gain_for_ppo_over_itself():
    row = {"completion_rate": 0.2, "sft": [0.0, 0.0], "kl": [1.0, 1.0], "length": [5.0, 5.0]}
    table = markdown(
        [
            {**row, "beta": 0.0, "reward": [1.0, 1.0], "gain_over_ppo": [0.0, 0.0]},
            {**row, "beta": 1.0, "reward": [3.0, 3.0], "gain_over_ppo": [2.0, 2.0]},
        ]
    ).splitlines()
    assert table[2] == "| 0.2 | 0 (PPO) | 0.00 ± 0.00 | 1.00 ± 0.00 | - | 1.00 ± 0.00 | 5.00 ± 0.00 |"
    assert table[3] == "| 0.2 | 1 | 0.00 ± 0.00 | 3.00 ± 0.00 | 2.00 ± 0.00 | 1.00 ± 0.00 | 5.00 ± 0.00 |"


def test_the_grid_needs_ppo_and_two_seeds():
    with pytest.raises(ConfigError, match="betas must hold 0.0"):
        load_recipe(ExperimentRecipe, None, ["betas=[0.5,1.0]"])
    with pytest.raises(ConfigError, match="seeds must be two or more"):
        load_recipe(ExperimentRecipe, None, ["seeds=[0]"])
