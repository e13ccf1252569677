"""Train by PPO: the online loop without resets (always reset.proportion=0).

accelerate launch launch/ppo.py [recipe.yaml] [section.key=value ...]
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from drpo.api import train_online
from drpo.trainers.online_recipe import OnlineRecipe
from launch.command_line import main
from launch.drpo import inputs

if __name__ == "__main__":
    main(OnlineRecipe, "demo/ppo.yaml", train_online, inputs, forced=["reset.proportion=0"])
