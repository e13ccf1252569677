"""Run the whole pipeline with SmolLM2 on TL;DR: SFT, reward model and its evaluation, PPO, DR-PO, DPO, comparison.

python launch/demo_real.py [file or hub id with TL;DR data]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from drpo.config import load_recipe
from drpo.data.files import read_table
from drpo.data.records import BadRows, DataError
from eval.comparing.recipe import CompareRecipe
from launch.command_line import find_recipe, quieten_libraries, run_stage

STAGES = ("sft", "reward_model", "evaluate_reward_model", "ppo", "drpo", "dpo", "compare")


def main() -> None:
    """Run every stage on its recipe demo_real/<stage>.yaml, skipping those that have finished."""
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        raise SystemExit(__doc__.strip())
    quieten_libraries()
    recipe = load_recipe(CompareRecipe, find_recipe("demo_real/compare.yaml"), [])
    path = sys.argv[1] if len(sys.argv) == 2 else recipe.complete.data.path
    try:
        read_table(path, "train", BadRows(), limit=1)
    except DataError as error:
        raise SystemExit(
            f"demo_real.py: {error}\nIt needs real posts with summaries: {recipe.complete.data.path} from the hub, or "
            "a file with the columns post, summaries and overall (or any other layout of TL;DR in docs/data.md):\n"
            "    make demo-real DATA=path/to/axis.jsonl"
        ) from None
    started = time.monotonic()
    for stage in STAGES:
        key = "complete.data.path" if stage == "compare" else "data.path"
        run_stage(stage, f"demo_real/{stage}.yaml", f"{key}={path}")
        print(f"{(time.monotonic() - started) / 60:.1f} minutes so far", flush=True)
    folder = Path(recipe.run_dir)
    print(f"policies, metrics and samples are in {folder.parent}; open the reports in a browser:")
    print(f"  {folder / 'report.html'}")
    print(f"  {folder.parent / 'evaluate_reward_model' / 'evaluation.html'}")


if __name__ == "__main__":
    main()
