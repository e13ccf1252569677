"""Run the whole pipeline on the embedded demo: SFT, reward model and its evaluation, PPO, DR-PO, comparison.

python launch/demo.py
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from rich.console import Console

from launch.command_line import quieten_libraries, run_stage
from launch.demo_inputs import DEMO_RUNS
from launch.demo_results import error_table, evaluations, plot

STAGES = ("sft", "reward_model", "evaluate_reward_model", "ppo", "drpo")
REPORT = DEMO_RUNS / "compare" / "report.html"


def main() -> None:
    """Run every stage, skipping those that have finished."""
    if sys.argv[1:]:
        raise SystemExit(f"{__doc__.strip()}\n\nIt takes no arguments; the stages do: launch/drpo.py --help")
    quieten_libraries()
    for stage in STAGES:
        run_stage(stage, f"demo/{stage}.yaml")
    ppo, drpo = (evaluations(DEMO_RUNS / stage) for stage in ("ppo", "drpo"))
    Console().print(error_table(DEMO_RUNS / "reward_model" / "reward_model"))
    plot({"PPO": ppo, "DR-PO": drpo}, DEMO_RUNS / "curves.png")
    run_stage("compare", "demo/compare.yaml")
    print("policies, metrics and sample completions, curves, and the report to open in a browser:")
    for path in (*(DEMO_RUNS / stage for stage in STAGES), DEMO_RUNS / "curves.png", REPORT):
        print(f"  {path}")


if __name__ == "__main__":
    main()
