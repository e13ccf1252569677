"""Compare PPO and DR-PO on the demo, over the rate at which the SFT policy completes a good summary.

    python launch/experiments/resets.py [recipe.yaml] [key=value ...]

For every completion rate and seed: one SFT policy, then one online run with the true reward for every beta
(reset.proportion). Finished runs are skipped, so the same command resumes a stopped experiment.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parents[1])

import numpy as np
from matplotlib.figure import Figure

from drpo.config import Section, refuse, setting
from launch.command_line import StageFailed, main
from launch.experiments.results import markdown_table, metric, write_results
from launch.experiments.seed_grid import RunGrid, interval

COLUMNS = {
    "SFT true reward": "sft",
    "final true reward": "reward",
    "gain over PPO": "gain_over_ppo",
    "KL to SFT": "kl",
    "length": "length",
}
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
    settings = {
        (rate, seed): [f"seed={seed}", f"data.demo.seed={seed}", f"data.demo.completion_rate={rate}"]
        for seed in recipe.seeds
        for rate in recipe.completion_rates
    }
    with RunGrid(recipe.num_jobs, len(settings) * (1 + len(recipe.betas))) as grid:
        policies = {
            (rate, seed): grid.launch("sft", "demo/sft.yaml", _sft_dir(root, rate, seed), setting)
            for (rate, seed), setting in settings.items()
        }
        for (rate, seed), policy in policies.items():
            for beta in recipe.betas:
                overrides = [
                    *settings[rate, seed],
                    f"model.path={_sft_dir(root, rate, seed)}/policy",
                    f"reset.proportion={beta}",
                    f"reward.function={TRUE_REWARD}",
                    "reward.path=null",
                    "reward.batch_size=32",  # the defaults: demo/drpo.yaml sets what a reward model needs
                    "reward.shaping.missing_stop=none",
                    "reward.shaping.missing_stop_penalty=1",
                    "critic.path=null",
                    *recipe.online,
                ]
                run_dir = _online_dir(root, rate, beta, seed)
                grid.launch("drpo", "demo/drpo.yaml", run_dir, overrides, needs=[policy])
    rows = [_summary(recipe, rate, beta) for rate in recipe.completion_rates for beta in recipe.betas]
    path = write_results(root, rows, markdown(rows))
    _plot(recipe, rows, root / "results.png")
    return path


def _sft_dir(root: Path, rate: float, seed: int) -> Path:
    return root / f"sft_{rate:g}_{seed}"


def _online_dir(root: Path, rate: float, beta: float, seed: int) -> Path:
    return root / f"online_{rate:g}_beta{beta:g}_{seed}"


def _measured(run_dir: Path, key: str) -> list[float]:
    if values := metric(run_dir, key):
        return values
    raise StageFailed(
        f"{run_dir}/metrics.jsonl has no {key}; eval/kl is measured at the temperature of training and with "
        "evaluations on (docs/experiments.md)"
    )


def _summary(recipe: ExperimentRecipe, rate: float, beta: float) -> dict[str, float | list[float]]:
    root = Path(recipe.run_dir)

    def over_seeds(beta: float, key: str, index: int = -1) -> np.ndarray:
        return np.array([_measured(_online_dir(root, rate, beta, s), key)[index] for s in recipe.seeds])

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
    table = []
    for row in rows:
        is_ppo = row["beta"] == 0
        cells = {
            "completion rate": f"{row['completion_rate']:g}",
            "beta": f"{row['beta']:g}" + " (PPO)" * is_ppo,
        }
        cells |= {name: "{:.2f} ± {:.2f}".format(*interval(row[key])) for name, key in COLUMNS.items()}
        table.append(cells | {"gain over PPO": "-"} if is_ppo else cells)
    return markdown_table(table)


def _plot(recipe: ExperimentRecipe, rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(6, 4))
    axis = figure.subplots()
    for beta in recipe.betas:
        beta_rows = [row for row in rows if row["beta"] == beta]
        means, halves = zip(*(interval(row["reward"]) for row in beta_rows), strict=True)
        label = "PPO" if beta == 0 else f"DR-PO, beta {beta:g}"
        axis.errorbar(
            [row["completion_rate"] for row in beta_rows], means, halves, marker="o", capsize=3, label=label
        )
    axis.set_xscale("log")
    axis.set_xlabel("share of demonstrations that are complete")
    axis.set_ylabel("true reward after training (95% interval)")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(ExperimentRecipe, "demo/reset_experiment.yaml", run)
