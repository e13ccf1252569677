"""Ask a judge which of two systems responds better: a model behind an API, a reward model or a function.

    python launch/judge.py [recipe.yaml] [key=value ...]

Writes judgments.jsonl, summary.json, config.yaml and, for a model behind an API, the store to `run_dir`. Running it
again sends only the requests without an answer.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from eval.judging.judge_systems import JudgeRecipe, judge
from launch.command_line import main

if __name__ == "__main__":
    main(JudgeRecipe, "demo/judge.yaml", judge, lambda recipe: recipe.completions, one_process=True)
