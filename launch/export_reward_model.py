"""Write a reward model as a *ForSequenceClassification folder of transformers, for other tools.

python launch/export_reward_model.py REWARD_MODEL FOLDER
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from launch.command_line import USER_ERRORS, quieten_libraries
from reward_models.export import export_classifier


def main() -> None:
    """Read the command line, write the folder, print its path."""
    parser = argparse.ArgumentParser(
        prog="drpo export-reward-model",
        description="Write a reward model as a sequence classifier with one label, which transformers loads with "
        "AutoModelForSequenceClassification, with its tokenizer and chat template.",
    )
    parser.add_argument("reward_model", help="folder that launch/reward_model.py made")
    parser.add_argument("folder", type=Path, help="folder to write; an older one is replaced")
    options = parser.parse_args()
    quieten_libraries()
    try:
        notes = export_classifier(options.reward_model, options.folder, "REWARD_MODEL")
    except USER_ERRORS as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None
    print(*notes, options.folder.resolve(), sep="\n")


if __name__ == "__main__":
    main()
