"""The whole pipeline on the embedded demo: SFT, reward model, PPO and DR-PO, then one table and one plot.

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
from rich.table import Table

from drpo.metrics import read_metrics
from launch.demo_inputs import DEMO_RUNS

STAGES = ("sft", "reward_model", "ppo", "drpo")

COLUMNS = {
    "true reward": "eval/true_reward",
    "reward-model score": "eval/score",
    "KL to SFT (nats)": "eval/kl",
    "length (tokens)": "eval/length",
    "ended": "eval/ended",
}


def main() -> None:
    """Run every stage; a stage that is already finished is only looked up."""
    for stage in STAGES:
        print(f"\n=== {stage}: launch/{stage}.py demo/{stage}.yaml", flush=True)
        subprocess.run([sys.executable, str(HERE / f"{stage}.py"), f"demo/{stage}.yaml"], check=True)
    ppo, drpo = (evaluations(DEMO_RUNS / stage) for stage in ("ppo", "drpo"))
    rows = {"SFT": drpo[0], "PPO": ppo[-1], "DR-PO": drpo[-1]}
    Console().print(table(rows))
    plot({"PPO": ppo, "DR-PO": drpo}, DEMO_RUNS / "curves.png")
    print("policies, metrics and sample completions:")
    for path in (*(DEMO_RUNS / stage for stage in STAGES), DEMO_RUNS / "curves.png"):
        print(f"  {path}")


def evaluations(run: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics that hold an evaluation, first to last."""
    return [row for row in read_metrics(run / "metrics.jsonl") if "eval/score" in row]


def table(rows: dict[str, dict[str, float]]) -> Table:
    """Policies x measurements on the same held-out prompts, sampled at temperature 1."""
    result = Table(title="held-out prompts, temperature 1 (one seed; docs/experiments.md has intervals)")
    result.add_column("policy")
    for name in COLUMNS:
        result.add_column(name, justify="right")
    for policy, row in rows.items():
        result.add_row(policy, *(f"{row[key]:.2f}" for key in COLUMNS.values()))
    return result


def plot(runs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """True reward and reward-model score on held-out prompts over training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), sharex=True)
    for axis, (name, key) in zip(axes, list(COLUMNS.items())[:2], strict=True):
        for policy, rows in runs.items():
            axis.plot([row["step"] for row in rows], [row[key] for row in rows], marker="o", label=policy)
        axis.set_xlabel("step")
        axis.set_title(f"{name}, held-out prompts")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
