"""Run an online recipe: what launch/drpo.py and launch/ppo.py share."""

from __future__ import annotations

from pathlib import Path

from drpo.api import train_online
from drpo.trainers.online_recipe import OnlineRecipe
from launch.demo_inputs import make_demo_inputs


def run(recipe: OnlineRecipe) -> Path:
    """Make what the demo needs and lacks, then train."""
    make_demo_inputs(recipe.model.path, recipe.reward.path, recipe.critic.path)
    return train_online(recipe)
