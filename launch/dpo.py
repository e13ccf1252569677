"""Train a policy on preferences: DPO and its family, chosen by the recipe.

accelerate launch launch/dpo.py [recipe.yaml] [section.key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from drpo.api import train_preference
from drpo.trainers.preference.recipe import PreferenceRecipe
from launch.command_line import main
from launch.demo_inputs import make_demo_inputs


def run(recipe: PreferenceRecipe) -> Path:
    """Train the demo's SFT policy if it is requested and missing, then train."""
    make_demo_inputs(recipe.model.path)
    return train_preference(recipe)


if __name__ == "__main__":
    main(PreferenceRecipe, "demo/dpo.yaml", run)
