"""Compare several systems on the same held-out prompts: pairwise win rates, KL and a report.

    python launch/compare.py [recipe.yaml] [key=value ...]
    accelerate launch launch/compare.py [recipe.yaml] [key=value ...]

Writes comparison.json, report.html, report.md, config.yaml, the completions and the judgments to `run_dir`. Running it
again computes, and pays for, only what is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from eval.comparing.compare import compare
from eval.comparing.recipe import CompareRecipe
from launch.command_line import main


def inputs(recipe: CompareRecipe) -> list[str | None]:
    """List the models that the recipe names."""
    policies = [policy for system in recipe.systems for policy in system.policies]
    return [*policies, recipe.kl_reference, recipe.reward_model]


if __name__ == "__main__":
    main(CompareRecipe, "demo/compare.yaml", compare, inputs)
