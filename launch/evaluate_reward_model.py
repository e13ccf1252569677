"""Evaluate reward models, or preference-trained policies, on pairs: accuracy, calibration, length bias, best of n.

    python launch/evaluate_reward_model.py [recipe.yaml] [key=value ...]

One process, one device. Writes evaluation.html, evaluation.md, evaluation.json, pairs.jsonl, plots and config.yaml
to `run_dir`.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from eval.reward_models.evaluate import evaluate_reward_model
from eval.reward_models.recipe import EvaluateRewardModelRecipe
from launch.command_line import main


def inputs(recipe: EvaluateRewardModelRecipe) -> list[str | None]:
    """List the models that the recipe names."""
    models = [path for model in recipe.models for path in (model.path, model.reference)]
    return [*models, recipe.best_of_n.policy]


if __name__ == "__main__":
    main(
        EvaluateRewardModelRecipe,
        "demo/evaluate_reward_model.yaml",
        evaluate_reward_model,
        inputs,
        one_process=True,
    )
