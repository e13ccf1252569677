"""Run the whole pipeline on the embedded demo: SFT, reward model, PPO, DR-PO, curves and comparison.

python launch/demo.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from rich.console import Console

from launch.command_line import quieten_libraries
from launch.demo_inputs import DEMO_RUNS
from launch.demo_results import error_table, evaluations, plot

STAGES = ("sft", "reward_model", "ppo", "drpo")
REPORT = DEMO_RUNS / "compare" / "report.html"


def main() -> None:
    """Run every stage, skipping those that have finished."""
    if sys.argv[1:]:
        raise SystemExit(f"{__doc__.strip()}\n\nIt takes no arguments; the stages do: launch/drpo.py --help")
    quieten_libraries()
    for stage in STAGES:
        launch(stage)
    ppo, drpo = (evaluations(DEMO_RUNS / stage) for stage in ("ppo", "drpo"))
    Console().print(error_table(DEMO_RUNS / "reward_model" / "reward_model"))
    plot({"PPO": ppo, "DR-PO": drpo}, DEMO_RUNS / "curves.png")
    launch("compare")
    print("policies, metrics and sample completions, curves, and the report to open in a browser:")
    for path in (*(DEMO_RUNS / stage for stage in STAGES), DEMO_RUNS / "curves.png", REPORT):
        print(f"  {path}")


def launch(stage: str) -> None:
    """Run a script on its demo recipe, as a user would."""
    print(f"\n=== {stage}: launch/{stage}.py demo/{stage}.yaml", flush=True)
    if subprocess.run([sys.executable, str(HERE / f"{stage}.py"), f"demo/{stage}.yaml"]).returncode:
        raise SystemExit(f"demo.py: the stage {stage} failed; the same command again goes on from there")


if __name__ == "__main__":
    main()
