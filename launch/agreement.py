"""Measure the agreement of a judge with human annotators, and of the annotators with each other.

    python launch/agreement.py [recipe.yaml] [key=value ...]

Reads judgments.jsonl of launch/judge.py and labels.jsonl of launch/label.py or launch/import_labels.py; writes
agreement.json to `run_dir` and prints it as tables. With several judgments files, judges are also compared with each
other.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from eval.labelling.agreement import AgreementRecipe, agreement
from launch.command_line import main

if __name__ == "__main__":
    main(AgreementRecipe, "demo/agreement.yaml", agreement)
