"""A reward model from preference pairs.

accelerate launch launch/reward_model.py [recipe.yaml] [section.key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from drpo.engine import Engine
from launch.command_line import main
from launch.demo_inputs import make_demo_inputs
from reward_models.train import RewardModelRecipe, train


def run(recipe: RewardModelRecipe) -> Path:
    """Train the recipe's reward model, on top of the demo's SFT policy where that is asked for and missing."""
    make_demo_inputs(recipe.model.path)
    engine = Engine(recipe.engine, Path(recipe.run_dir), recipe.seed, recipe.optim.max_grad_norm)
    return train(recipe, engine)


if __name__ == "__main__":
    main(RewardModelRecipe, "demo/reward_model.yaml", run)
