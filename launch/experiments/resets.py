"""Compare shares of resets, ways to reset, and estimators, on the demo: true reward, and what was sampled for it.

    python launch/experiments/resets.py [recipe.yaml] [key=value ...]

For every completion rate and seed: one SFT policy (and one reward model, if the reward is learned), then one online run
for every method. Finished runs are skipped, so the same command resumes a stopped experiment.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parents[1])

import numpy as np
from matplotlib.figure import Figure

from drpo.config import Section, load_recipe, refuse, setting
from drpo.run.metrics import read_metrics
from drpo.trainers.online_recipe import OnlineRecipe
from launch.command_line import StageFailed, main
from launch.experiments.results import markdown_table, plot_seeds, write_results
from launch.experiments.seed_grid import RunGrid, chosen, interval

TRUE_REWARD = (
    "reward.function=drpo.data.tasks.demo:true_rewards",
    "reward.path=null",
    "reward.batch_size=32",  # the defaults: the demo's recipes set what a reward model needs
    "reward.shaping.missing_stop=none",
    "reward.shaping.missing_stop_penalty=1",
)
SAMPLED = ("objective/sampled_tokens", "vine/sampled_tokens", "reset/initial_tokens")


@dataclass(frozen=True)
class ResetsRecipe(Section):
    """Grid of the experiment."""

    run_dir: str = "runs/reset_experiment"
    """Folder of all runs, and of results.json, results.md and a results*.png for every question."""
    completion_rates: list[float] = field(default_factory=lambda: [0.2, 0.0078125, 0.003])
    """Settings of data.demo.completion_rate, from often to hardly ever."""
    methods: dict[str, list[str]] = field(
        default_factory=lambda: {"PPO": ["demo/ppo.yaml"], "DR-PO": ["demo/drpo.yaml"]}
    )
    """Online runs by name: a recipe, and overrides of it."""
    questions: dict[str, list[str]] = field(default_factory=dict)
    """Tables and plots of some of the methods, by title: the names of the methods, in their order. Without any, one of
    all methods."""
    only: list[str] = field(default_factory=list)
    """Names of the methods to run and to show; empty for all. Questions about none of them, or about no other than the
    baseline, are left out."""
    baseline: str = "DR-PO"
    """The method to which the others are compared, seed by seed."""
    reward: Literal["true", "learned"] = "true"
    """What the online runs are trained on: the true reward, or a reward model of the seed (demo/reward_model.yaml)."""
    through: float = 2.0
    """A seed has got through where its true reward ends at least here; a complete summary is worth 4."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """Seeds; each has its own posts, SFT policy, reward model and online runs."""
    num_jobs: int = setting(2, ge=1)
    """Runs at a time, each on its share of the cores."""
    sft: list[str] = field(default_factory=list)
    """Further overrides of demo/sft.yaml."""
    reward_model: list[str] = field(default_factory=list)
    """Further overrides of demo/reward_model.yaml."""
    online: list[str] = field(default_factory=list)
    """Further overrides of every method."""

    def check(self) -> None:
        known, shown = ", ".join(self.methods), self.shown
        for title, names in self.questions.items():
            unknown = [name for name in names if name not in self.methods]
            refuse(
                bool(unknown), f"questions.{title}", f"names {', '.join(unknown)}, and methods are {known}"
            )
        asked = {name for names in self.questions.values() for name in names}
        unasked = [name for name in shown if self.questions and name not in asked]
        rule = f"must have {', '.join(unasked)} in one of them, or its results are not shown"
        refuse(bool(unasked), "questions", rule)
        rule = f"({self.baseline}) must be one of {', '.join(shown)}"
        refuse(self.baseline not in shown, "baseline", rule)
        refuse(len(self.seeds) < 2, "seeds", f"must be two or more, for intervals, got {self.seeds}")
        folders = [_slug(name) for name in ("sft", "reward model", *self.methods)]
        for name, method in self.methods.items():
            rule = f"has the folder of another run, {_slug(name)}; choose another name"
            refuse(folders.count(_slug(name)) > 1, f"methods.{name}", rule)
            refuse(not method, f"methods.{name}", "must begin with a recipe, such as demo/drpo.yaml")

    @property
    def shown(self) -> dict[str, list[str]]:
        """The methods that are run, in their order."""
        return chosen(self.methods, self.only)


class Curve(NamedTuple):
    """Evaluations of one run."""

    episodes: list[int]
    "Rollouts until then."
    tokens: list[float]
    "Sampled until then, for rollouts, values and prefixes."
    rewards: list[float]
    "True reward on held-out posts, from the bare prompt."
    kl: float
    "To the SFT policy, at the end, per response."


def run(recipe: ResetsRecipe) -> Path:
    """Run the grid and write the results."""
    root = Path(recipe.run_dir)
    root.mkdir(parents=True, exist_ok=True)
    per_seed = 1 + (recipe.reward == "learned") + len(recipe.shown)
    with RunGrid(recipe.num_jobs, len(recipe.seeds) * len(recipe.completion_rates) * per_seed) as grid:
        for seed in recipe.seeds:
            for rate in recipe.completion_rates:
                _launch(grid, recipe, root, rate, seed)
    curves = {
        (rate, name): [read_curve(_folder(root, name, rate, seed)) for seed in recipe.seeds]
        for rate in recipe.completion_rates
        for name in recipe.shown
    }
    rows = [
        summary(rate, name, of_seeds, curves[rate, recipe.baseline], recipe.through)
        for (rate, name), of_seeds in curves.items()
    ]
    texts = []
    for title, names in (recipe.questions or {"": list(recipe.methods)}).items():
        names = [name for name in names if name in recipe.shown]
        if not names or (names == [recipe.baseline] and len(recipe.shown) > 1):
            continue
        texts.append(f"## {title}\n\n" * bool(title))
        texts.append(markdown([row for row in rows if row["method"] in names], recipe.baseline))
        name = f"results_{_slug(title)}.png" if title else "results.png"
        _plot({key: curves[key] for key in curves if key[1] in names}, root / name)
    return write_results(root, rows, "\n".join(texts))


def _folder(root: Path, name: str, rate: float, seed: int) -> Path:
    return root / f"{_slug(name)}_{rate:g}_{seed}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower().replace("++", "_pp")).strip("_")


def _launch(grid: RunGrid, recipe: ResetsRecipe, root: Path, rate: float, seed: int) -> None:
    sft = _folder(root, "sft", rate, seed)
    data = [f"seed={seed}", f"data.demo.seed={seed}"]
    rated = [*data, f"data.demo.completion_rate={rate}"]
    needs = [grid.launch("sft", "demo/sft.yaml", sft, [*rated, *recipe.sft])]
    start = f"model.path={sft}/policy"
    reward = list(TRUE_REWARD)
    if recipe.reward == "learned":
        folder = _folder(root, "reward model", rate, seed)
        needs = [
            grid.launch(
                "reward_model", "demo/reward_model.yaml", folder, [*data, start, *recipe.reward_model], needs
            )
        ]
        reward = [f"reward.path={folder}/reward_model"]
    for name, (method, *overrides) in recipe.shown.items():
        settings = [*rated, start, *reward, "eval.every=4", *overrides, *recipe.online]
        grid.launch("drpo", method, _folder(root, name, rate, seed), settings, needs)


def read_curve(run_dir: Path) -> Curve:
    """Read the evaluations of a run; raise StageFailed when it has none."""
    batch_size = load_recipe(OnlineRecipe, run_dir / "config.yaml", []).rollout.batch_size
    rows = read_metrics(run_dir / "metrics.jsonl")
    tokens, curve = 0.0, []
    for row in rows:
        tokens += sum(row.get(key, 0.0) for key in SAMPLED)
        if "eval/true_reward" in row:
            curve.append((row["step"] * batch_size, tokens, row["eval/true_reward"]))
    kls = [row["eval/kl"] for row in rows if "eval/kl" in row]
    if not curve or not kls:
        raise StageFailed(f"{run_dir}/metrics.jsonl has no eval/true_reward and eval/kl: evaluations are off")
    return Curve(*map(list, zip(*curve, strict=True)), kls[-1])


def until(curve: Curve, reward: float, sampled: Sequence[float]) -> float | None:
    """Return what was `sampled` until an evaluation first gives at least this true reward; None when none does.

    `sampled` are the curve's episodes or tokens.
    """
    return next((n for n, r in zip(sampled, curve.rewards, strict=True) if r >= reward), None)


def summary(
    rate: float, name: str, curves: Sequence[Curve], baseline: Sequence[Curve], through: float
) -> dict[str, Any]:
    """Compute the results of a method at a completion rate, seed by seed.

    `share_of_baseline_tokens` has the seeds in which the baseline got through, None where its reward was not reached.

    Args:
        rate: the completion rate.
        name: the method.
        curves: its runs, one a seed.
        baseline: those of the method to compare with, in the same order.
        through: true reward at which a seed has got through.
    """
    pairs = list(zip(curves, baseline, strict=True))
    return {
        "completion_rate": rate,
        "method": name,
        "sft": [run.rewards[0] for run in curves],
        "reward": [run.rewards[-1] for run in curves],
        "gain": [run.rewards[-1] - other.rewards[-1] for run, other in pairs],
        "num_through": sum(run.rewards[-1] >= through for run in curves),
        "kl": [run.kl for run in curves],
        "tokens": [run.tokens[-1] for run in curves],
        "episodes_until_through": [until(run, through, run.episodes) for run in curves],
        "tokens_until_through": [until(run, through, run.tokens) for run in curves],
        "share_of_baseline_tokens": [
            None if needed is None else needed / other.tokens[-1]
            for run, other in pairs
            if other.rewards[-1] >= through
            for needed in [until(run, other.rewards[-1], run.tokens)]
        ],
    }


def markdown(rows: Sequence[Mapping[str, Any]], baseline: str) -> str:
    """Format the table of results: means over seeds with the 95% t-interval, the gain paired by seed."""
    table = []
    for row in rows:
        is_baseline = row["method"] == baseline
        kilotokens = [None if t is None else t / 1000 for t in row["tokens_until_through"]]
        table.append(
            {
                "completion rate": f"{row['completion_rate']:.3g}",
                "method": row["method"],
                "SFT true reward": "{:.2f} ± {:.2f}".format(*interval(row["sft"])),
                "true reward": "{:.2f} ± {:.2f}".format(*interval(row["reward"])),
                f"gain over {baseline}": "-"
                if is_baseline
                else "{:.2f} ± {:.2f}".format(*interval(row["gain"])),
                "KL to SFT": "{:.2f} ± {:.2f}".format(*interval(row["kl"])),
                "tokens sampled": f"{np.mean(row['tokens']) / 1000:.1f}k",
                "seeds through": f"{row['num_through']} of {len(row['reward'])}",
                "episodes until through": _median(row["episodes_until_through"], ".0f", ""),
                "tokens until through": _median(kilotokens, ".1f", "k"),
                f"share of {baseline}'s tokens until its final reward": _median(
                    row["share_of_baseline_tokens"], ".2f", ""
                ),
            }
        )
    return markdown_table(table)


def _median(values: Sequence[float | None], digits: str, unit: str) -> str:
    """Format the median and range of the seeds that have a value, and how many have one."""
    reached = [value for value in values if value is not None]
    if not reached:
        return "-" if not values else f"none of {len(values)}"
    low, high = (f"{number:{digits}}{unit}" for number in (min(reached), max(reached)))
    return f"{np.median(reached):{digits}}{unit} ({low} to {high}), {len(reached)} of {len(values)}"


def _plot(curves: Mapping[tuple[float, str], Sequence[Curve]], path: Path) -> None:
    """Plot the true reward against the sampled tokens: mean and range over the seeds, evaluation by evaluation."""
    rates = list(dict.fromkeys(rate for rate, _ in curves))
    figure = Figure(figsize=(5.5 * len(rates), 4.2))
    axes = figure.subplots(1, len(rates), squeeze=False, sharey=True)[0]
    for (rate, name), of_seeds in curves.items():
        axis = axes[rates.index(rate)]
        kilotokens = [np.divide(run.tokens, 1000) for run in of_seeds]
        plot_seeds(axis, kilotokens, [run.rewards for run in of_seeds], name)
        axis.set_title(f"completion rate {rate:.3g}")
        axis.set_xlabel("sampled tokens (thousands)")
    axes[0].set_ylabel("true reward (mean and range over seeds)")
    axes[-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(ResetsRecipe, "demo/reset_experiment.yaml", run)
