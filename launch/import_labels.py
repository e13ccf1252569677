"""Import human preference labels of a dataset: TL;DR comparisons, HH, or the user's own pairs.

    python launch/import_labels.py [recipe.yaml] [key=value ...]

Writes completions.jsonl (systems text_1 and text_2, for launch/judge.py) and labels.jsonl (for launch/agreement.py) to
`run_dir`.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from eval.labelling.import_labels import ImportLabelsRecipe, import_labels
from launch.command_line import main

if __name__ == "__main__":
    main(ImportLabelsRecipe, "demo/import_labels.yaml", import_labels)
