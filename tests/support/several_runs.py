"""A launch script for tests: several preference runs in one launch, since starting processes is what takes time.

several_runs.py <prefix> a.yaml b.yaml [key=value ...]    leaves the run folders <prefix>_a and <prefix>_b
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from online_runs import forget_precision

from drpo.api import train_preference as run
from drpo.config import load_recipe
from drpo.trainers.preference.recipe import PreferenceRecipe


def main(prefix: str, *arguments: str) -> None:
    leave = torch.distributed.destroy_process_group
    # DeepSpeed keeps the first process group for good: runs after the first one need it.
    torch.distributed.destroy_process_group = lambda *_: None
    overrides = [argument for argument in arguments if "=" in argument]
    for recipe in map(Path, (argument for argument in arguments if "=" not in argument)):
        forget_precision()
        run(load_recipe(PreferenceRecipe, recipe, [*overrides, f"run_dir={prefix}_{recipe.stem}"]))
    if torch.distributed.is_initialized():
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
