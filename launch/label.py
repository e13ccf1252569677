"""Ask people which of two systems responds better, on a page on this machine that shows the responses blind.

    python launch/label.py [recipe.yaml] [key=value ...]

Prints the address of the page and serves it until Ctrl-C. Every label is appended to `run_dir`/labels.jsonl at once;
the same command resumes. launch/agreement.py compares the labels with a judge's verdicts.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from eval.labelling.label import LabelRecipe, label
from launch.command_line import main

if __name__ == "__main__":
    main(LabelRecipe, "demo/label.yaml", label, lambda recipe: recipe.completions, one_process=True)
