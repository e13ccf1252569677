"""Supervised fine-tuning on demonstrations.

accelerate launch launch/sft.py [recipe.yaml] [section.key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from drpo.engine import Engine
from drpo.reward_functions import import_functions
from drpo.trainers.sft import SFTRecipe, train
from launch.command_line import main


def run(recipe: SFTRecipe) -> Path:
    """Train the recipe's policy."""
    engine = Engine(recipe.engine, Path(recipe.run_dir), recipe.seed, recipe.optim.max_grad_norm)
    rewards = import_functions(recipe.sample.reward_functions, "sample.reward_functions")
    return train(recipe, engine, rewards)


if __name__ == "__main__":
    main(SFTRecipe, "demo/sft.yaml", run)
