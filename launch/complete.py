"""Collect the responses of a policy, or of a file made elsewhere, as one JSONL file for judges and tables.

    python launch/complete.py [recipe.yaml] [key=value ...]
    accelerate launch launch/complete.py [recipe.yaml] [key=value ...]

Writes completions.jsonl, completions.meta.json (the settings that determine the texts), text_metrics.json and
config.yaml to `run_dir`. Running it again resumes an interrupted run.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from eval.completions.complete import complete
from eval.completions.recipe import CompleteRecipe
from launch.command_line import main

if __name__ == "__main__":
    main(
        CompleteRecipe,
        "demo/complete.yaml",
        complete,
        lambda recipe: [recipe.policy, recipe.perplexity_policy],
    )
