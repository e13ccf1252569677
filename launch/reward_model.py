"""Train a reward model on preference pairs.

accelerate launch launch/reward_model.py [recipe.yaml] [section.key=value ...]
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from launch.command_line import main
from reward_models.api import train_reward_model
from reward_models.train import RewardModelRecipe

if __name__ == "__main__":
    main(RewardModelRecipe, "demo/reward_model.yaml", train_reward_model, lambda recipe: [recipe.model.path])
