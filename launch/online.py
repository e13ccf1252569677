"""Run an online recipe, for launch/drpo.py and launch/ppo.py."""

from __future__ import annotations

from pathlib import Path

from drpo.api import train_online
from drpo.trainers.online_recipe import OnlineRecipe
from launch.demo_inputs import make_demo_inputs


def run(recipe: OnlineRecipe) -> Path:
    """Create the demo inputs that are requested and missing, then train."""
    make_demo_inputs(recipe.model.path, recipe.reward.path, recipe.critic.path)
    return train_online(recipe)
