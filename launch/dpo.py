"""Train a policy on preferences: DPO and its family, chosen by the recipe.

accelerate launch launch/dpo.py [recipe.yaml] [section.key=value ...]
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from drpo.api import train_preference
from drpo.trainers.preference.recipe import PreferenceRecipe
from launch.command_line import main

if __name__ == "__main__":
    main(PreferenceRecipe, "demo/dpo.yaml", train_preference, lambda recipe: [recipe.model.path])
