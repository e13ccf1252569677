"""Train by DR-PO: PPO whose rollouts may start from prefixes of dataset responses.

accelerate launch launch/drpo.py [recipe.yaml] [section.key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from drpo.api import train_online
from drpo.trainers.online_recipe import OnlineRecipe
from launch.command_line import main


def inputs(recipe: OnlineRecipe) -> list[str | None]:
    """List the models that the recipe names."""
    return [recipe.model.path, *recipe.reward.models.values(), recipe.critic.path]


if __name__ == "__main__":
    main(OnlineRecipe, "demo/drpo.yaml", train_online, inputs)
