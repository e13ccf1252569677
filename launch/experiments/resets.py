"""Compare PPO and DR-PO on the demo, over the rate at which the SFT policy completes a good summary.

    python launch/experiments/resets.py [recipe.yaml] [key=value ...]

For every completion rate and seed: one SFT policy, then one online run with the true reward for every beta
(reset.proportion). Finished runs are skipped, so the same command resumes a stopped experiment.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parents[1])

import numpy as np

from drpo.config import Section, refuse, setting
from drpo.run.metrics import read_metrics
from launch.command_line import StageFailed, main
from launch.experiments.seed_grid import RunGrid, interval, launch_once

TRUE_REWARD = "drpo.data.tasks.demo:true_rewards"


@dataclass(frozen=True)
class ExperimentRecipe(Section):
    """Grid of the experiment."""

    run_dir: str = "runs/reset_experiment"
    """Folder of all runs, and of results.json, results.md and results.png."""
    completion_rates: list[float] = field(default_factory=lambda: [0.2, 0.0078125, 0.003])
    """Settings of data.demo.completion_rate, from often to hardly ever."""
    betas: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 1.0])
    """Settings of reset.proportion; 0 is PPO and must be among them."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """Seeds; each has its own posts, SFT policy and online runs."""
    num_jobs: int = setting(2, ge=1)
    """Runs at a time, each on its share of the cores."""
    online: list[str] = field(default_factory=list)
    """Further overrides of demo/drpo.yaml for the online runs."""

    def check(self) -> None:
        rule = f"must hold 0.0 (PPO), to which the others are compared, got {self.betas}"
        refuse(0.0 not in self.betas, "betas", rule)
        refuse(len(self.seeds) < 2, "seeds", f"must be two or more, for intervals, got {self.seeds}")


def run(recipe: ExperimentRecipe) -> Path:
    """Run the grid and write the results."""
    root = Path(recipe.run_dir)
    root.mkdir(parents=True, exist_ok=True)
    settings = [(rate, seed) for seed in recipe.seeds for rate in recipe.completion_rates]
    with RunGrid(recipe.num_jobs, len(settings) * (1 + len(recipe.betas))) as grid:

        def one_setting(rate: float, seed: int) -> None:
            sft = root / f"sft_{rate:g}_{seed}"
            _launch("sft", recipe, sft, rate, seed, [])
            grid.advance()
            for beta in recipe.betas:
                overrides = [
                    f"model.path={sft}/policy",
                    f"reset.proportion={beta}",
                    f"reward.function={TRUE_REWARD}",
                    "reward.path=null",
                    "reward.batch_size=32",  # the defaults: demo/drpo.yaml sets what a reward model needs
                    "reward.shaping.missing_stop=none",
                    "reward.shaping.missing_stop_penalty=1",
                    "critic.path=null",
                    *recipe.online,
                ]
                _launch("drpo", recipe, _online_dir(root, rate, beta, seed), rate, seed, overrides)
                grid.advance()

        for rate, seed in settings:
            grid.submit(one_setting, rate, seed)
    rows = [_summary(recipe, rate, beta) for rate in recipe.completion_rates for beta in recipe.betas]
    (root / "results.json").write_text(json.dumps(rows, indent=1))
    (root / "results.md").write_text(markdown(rows))
    print(markdown(rows))
    _plot(recipe, rows, root / "results.png")
    return root / "results.md"


def _online_dir(root: Path, rate: float, beta: float, seed: int) -> Path:
    return root / f"online_{rate:g}_beta{beta:g}_{seed}"


def _launch(
    stage: str, recipe: ExperimentRecipe, run_dir: Path, rate: float, seed: int, overrides: list[str]
) -> None:
    setting = [f"seed={seed}", f"data.demo.seed={seed}", f"data.demo.completion_rate={rate}"]
    launch_once(stage, f"demo/{stage}.yaml", run_dir, [*setting, *overrides], recipe.num_jobs)


def _final(root: Path, rate: float, beta: float, seed: int, key: str, index: int = -1) -> float:
    rows = [r for r in read_metrics(_online_dir(root, rate, beta, seed) / "metrics.jsonl") if key in r]
    if not rows:
        raise StageFailed(
            f"{_online_dir(root, rate, beta, seed)}/metrics.jsonl has no {key}; eval/kl is measured at the temperature "
            "of training and with evaluations on (docs/experiments.md)"
        )
    return rows[index][key]


def _summary(recipe: ExperimentRecipe, rate: float, beta: float) -> dict[str, float | list[float]]:
    root = Path(recipe.run_dir)

    def over_seeds(beta: float, key: str, index: int = -1) -> np.ndarray:
        return np.array([_final(root, rate, beta, seed, key, index) for seed in recipe.seeds])

    reward = over_seeds(beta, "eval/true_reward")
    return {
        "completion_rate": rate,
        "beta": beta,
        "sft": over_seeds(beta, "eval/true_reward", 0).tolist(),
        "reward": reward.tolist(),
        "gain_over_ppo": (reward - over_seeds(0.0, "eval/true_reward")).tolist(),
        "kl": over_seeds(beta, "eval/kl").tolist(),
        "length": over_seeds(beta, "eval/length").tolist(),
    }


def markdown(rows: list[dict]) -> str:
    """Format the table of results: mean over seeds with the 95% t-interval, the gain paired by seed."""
    lines = [
        "| completion rate | beta | SFT true reward | final true reward | gain over PPO | KL to SFT | length |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [f"{row['completion_rate']:g}", f"{row['beta']:g}" + (" (PPO)" if row["beta"] == 0 else "")]
        for key in ("sft", "reward", "gain_over_ppo", "kl", "length"):
            mean, half = interval(row[key])
            is_ppo_itself = key == "gain_over_ppo" and row["beta"] == 0
            cells.append("-" if is_ppo_itself else f"{mean:.2f} ± {half:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _plot(recipe: ExperimentRecipe, rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for beta in recipe.betas:
        mine = [row for row in rows if row["beta"] == beta]
        means, halves = zip(*(interval(row["reward"]) for row in mine), strict=True)
        label = "PPO" if beta == 0 else f"DR-PO, beta {beta:g}"
        axis.errorbar([r["completion_rate"] for r in mine], means, halves, marker="o", capsize=3, label=label)
    axis.set_xscale("log")
    axis.set_xlabel("share of demonstrations that are complete")
    axis.set_ylabel("true reward after training (95% interval)")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main(ExperimentRecipe, "demo/reset_experiment.yaml", run)
