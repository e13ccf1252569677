"""Show on the demo what ensembles of reward models do to over-optimisation: true reward against KL.

    python launch/experiments/overoptimisation.py [recipe.yaml] [key=value ...]

For every seed: one SFT policy, reward models that differ in the seed of head and order alone, then one online run with
little KL penalty for every combination of them. Every run is scored by what it was trained on (the proxy) and by the
true reward. Finished runs are skipped, so the same command resumes a stopped experiment.
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

from drpo.config import Section, key, refuse, setting
from launch.command_line import StageFailed, main
from launch.experiments.results import markdown_table, metric, write_results
from launch.experiments.seed_grid import RunGrid, interval

COMBINATIONS = ("single", "mean", "min", "mean_minus_std", "mean_minus_variance")

CURVES = {"true": "eval/true_reward", "proxy": "eval/score", "kl": "eval/kl"}
COLUMNS = {
    "final true reward": "final",
    "gain over single": "gain_over_single",
    "best true reward": "best",
    "lost after the best": "lost",
    "final proxy": "proxy",
    "final KL": "kl",
}


@dataclass(frozen=True)
class OverOptimisationRecipe(Section):
    """Grid of the experiment."""

    run_dir: str = "runs/overoptimisation"
    """Folder of all runs, and of results.json, results.md and results.png."""
    combinations: list[str] = field(default_factory=lambda: ["single", "mean", "min", "mean_minus_std"])
    """Rewards of the online runs: the first reward model alone (single, to which the others are compared), or all of
    them by reward.ensemble.combine."""
    coef: float = setting(1.0, ge=0)
    """reward.ensemble.coef of mean_minus_std and mean_minus_variance."""
    num_members: int = setting(4, ge=2)
    """Reward models of an ensemble."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds; each has its own posts, SFT policy, reward models and online runs."""
    num_jobs: int = setting(2, ge=1)
    """Runs at a time, each on its share of the cores."""
    sft: list[str] = field(default_factory=list)
    """Further overrides of demo/sft.yaml."""
    reward_model: list[str] = field(default_factory=list)
    """Further overrides of demo/reward_model.yaml."""
    online: list[str] = field(default_factory=list)
    """Further overrides of demo/drpo.yaml."""

    def check(self) -> None:
        unknown = [name for name in self.combinations if name not in COMBINATIONS]
        refuse(bool(unknown), "combinations", f"are {', '.join(COMBINATIONS)}, got {', '.join(unknown)}")
        rule = f"must hold single, to which the others are compared, got {self.combinations}"
        refuse("single" not in self.combinations, "combinations", rule)
        refuse(len(self.seeds) < 2, "seeds", f"must be two or more, for intervals, got {self.seeds}")
        repeated = {name for name in self.combinations if self.combinations.count(name) > 1}
        refuse(
            bool(repeated), "combinations", f"names {', '.join(repeated)} twice; {key('seeds')} repeat runs"
        )


def run(recipe: OverOptimisationRecipe) -> Path:
    """Run the grid and write the results."""
    root = Path(recipe.run_dir)
    root.mkdir(parents=True, exist_ok=True)
    with RunGrid(
        recipe.num_jobs, len(recipe.seeds) * (1 + recipe.num_members + len(recipe.combinations))
    ) as grid:
        for seed in recipe.seeds:
            _launch(grid, recipe, root, seed)
    curves = {
        (name, seed): _curves(root, name, seed) for name in recipe.combinations for seed in recipe.seeds
    }
    rows = [summary(name, recipe.seeds, curves) for name in recipe.combinations]
    path = write_results(root, rows, markdown(rows))
    _plot(recipe, curves, root / "results.png")
    return path


def _launch(grid: RunGrid, recipe: OverOptimisationRecipe, root: Path, seed: int) -> None:
    data, sft = f"data.demo.seed={seed}", root / f"sft_{seed}"
    start = f"model.path={sft}/policy"
    policy = grid.launch("sft", "demo/sft.yaml", sft, [f"seed={seed}", data, *recipe.sft])
    folders = [root / f"reward_model_{seed}_{member}" for member in range(recipe.num_members)]
    members = [
        grid.launch(
            "reward_model",
            "demo/reward_model.yaml",
            folder,
            [f"seed={seed * 1000 + member}", data, start, *recipe.reward_model],
            needs=[policy],
        )
        for member, folder in enumerate(folders)
    ]
    paths = [f"{folder}/reward_model" for folder in folders]
    for name in recipe.combinations:
        overrides = [f"seed={seed}", data, start, *_reward(recipe, name, paths), *recipe.online]
        grid.launch("drpo", "demo/drpo.yaml", _online_dir(root, name, seed), overrides, needs=members)


def _reward(recipe: OverOptimisationRecipe, name: str, paths: list[str]) -> list[str]:
    if name == "single":
        return [f"reward.path={paths[0]}"]
    ensemble = [f"reward.ensemble.paths=[{','.join(paths)}]", f"reward.ensemble.combine={name}"]
    coef = [f"reward.ensemble.coef={recipe.coef}"] if name.startswith("mean_minus") else []
    return ["reward.path=null", *ensemble, *coef]


def _online_dir(root: Path, name: str, seed: int) -> Path:
    return root / f"online_{name}_{seed}"


def _curves(root: Path, name: str, seed: int) -> dict[str, list[float]]:
    """Return the true reward, the proxy and the KL of a run at its evaluations, the first before training."""
    curves = {curve: metric(_online_dir(root, name, seed), key) for curve, key in CURVES.items()}
    if missing := [CURVES[curve] for curve, values in curves.items() if not values]:
        raise StageFailed(
            f"{_online_dir(root, name, seed)}/metrics.jsonl has no {missing[0]}; eval/kl is measured at the "
            "temperature of training and with evaluations on (docs/experiments.md)"
        )
    return curves


def summary(name: str, seeds: list[int], curves: dict[tuple[str, int], dict[str, list[float]]]) -> dict:
    """Summarise the runs of a combination, one number a seed.

    best is the highest true reward of a run's evaluations, lost what it lost from there to the end: over-optimisation,
    if it rose by more than the noise of an evaluation.
    """
    true = [np.array(curves[name, seed]["true"]) for seed in seeds]
    single = [curves["single", seed]["true"][-1] for seed in seeds]
    return {
        "combination": name,
        "final": [float(run[-1]) for run in true],
        "gain_over_single": [float(run[-1] - other) for run, other in zip(true, single, strict=True)],
        "best": [float(run.max()) for run in true],
        "lost": [float(run.max() - run[-1]) for run in true],
        "proxy": [curves[name, seed]["proxy"][-1] for seed in seeds],
        "kl": [curves[name, seed]["kl"][-1] for seed in seeds],
        "curves": [curves[name, seed] for seed in seeds],
    }


def markdown(rows: list[dict]) -> str:
    """Format the table of results: mean over seeds with the 95% t-interval, the gain paired by seed."""
    table = []
    for row in rows:
        cells = {"reward": row["combination"]}
        cells |= {name: "{:.2f} ± {:.2f}".format(*interval(row[key])) for name, key in COLUMNS.items()}
        table.append(cells | {"gain over single": "-"} if row["combination"] == "single" else cells)
    return markdown_table(table)


def _plot(recipe: OverOptimisationRecipe, curves: dict, path: Path) -> None:
    """Plot true reward and proxy against the KL, the means over seeds at each evaluation, and each seed thinly."""
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots(1, 2)
    for axis, curve, label in zip(axes, ("true", "proxy"), ("true reward", "proxy (own unit)"), strict=True):
        for number, name in enumerate(recipe.combinations):
            runs = [curves[name, seed] for seed in recipe.seeds]
            mean = {part: np.mean([run[part] for run in runs], axis=0) for part in (curve, "kl")}
            axis.plot(mean["kl"], mean[curve], marker="o", markersize=3, color=f"C{number}", label=name)
            for run in runs:
                axis.plot(run["kl"], run[curve], color=f"C{number}", linewidth=0.5, alpha=0.5)
        axis.set_xlabel("KL to the SFT policy (nats per response)")
        axis.set_ylabel(label)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(OverOptimisationRecipe, "demo/overoptimisation.yaml", run)
