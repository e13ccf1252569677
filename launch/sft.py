"""Fine-tune a policy on demonstrations.

accelerate launch launch/sft.py [recipe.yaml] [section.key=value ...]
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from drpo.api import train_sft
from drpo.trainers.sft import SFTRecipe
from launch.command_line import main

if __name__ == "__main__":
    main(SFTRecipe, "demo/sft.yaml", train_sft)
