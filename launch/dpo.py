"""Offline preference training: DPO and its family, chosen by the recipe.

accelerate launch launch/dpo.py [recipe.yaml] [section.key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from drpo.engine import Engine
from drpo.reward_functions import import_functions
from drpo.trainers.preference.recipe import PreferenceRecipe
from drpo.trainers.preference.train import train
from launch.command_line import main
from launch.demo_inputs import make_demo_inputs


def run(recipe: PreferenceRecipe) -> Path:
    """Make what the demo needs and lacks, train the recipe's policy."""
    make_demo_inputs(recipe.model.path)
    engine = Engine(recipe.engine, Path(recipe.run_dir), recipe.seed, recipe.optim.max_grad_norm)
    rewards = import_functions(recipe.sample.reward_functions, "sample.reward_functions")
    return train(recipe, engine, rewards)


if __name__ == "__main__":
    main(PreferenceRecipe, "demo/dpo.yaml", run)
