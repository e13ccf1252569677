"""Compare ways to train reward models on one data set: accuracy, calibration, length bias and ensembles over seeds.

    python launch/experiments/reward_models.py tldr/smoke_reward_models.yaml data_path=axis.jsonl

For every seed: an SFT policy, unless the reward model names what it starts from, and a reward model of every variant.
One evaluation of all seeds of a variant on the held-out pairs follows. Finished runs are skipped, so the same command
resumes a stopped experiment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parents[1])

import numpy as np
import yaml
from matplotlib.figure import Figure
from numpy.typing import NDArray

from drpo.config import ConfigError, Section, load_recipe, refuse, setting
from eval.comparing.recipe import slug
from eval.reward_models.report import FILE
from eval.statistics.intervals import prompt_codes, prompt_means
from eval.statistics.pair_accuracy import outcomes
from eval.statistics.seeds import seed_difference
from launch.command_line import find_recipe, main
from launch.experiments.results import markdown_table, metric, write_results
from launch.experiments.seed_grid import RunGrid, interval
from reward_models.train import RewardModelRecipe

COMMON = ("data.", "seed=", "run_dir=")
OWN_DATA = ("data.noise.", "data.max_bad_fraction=")
"Settings of the data that leave the held-out pairs as they are."
ENSEMBLES = [{"combine": "mean"}, {"combine": "min"}, {"combine": "mean_minus_std"}]


@dataclass(frozen=True)
class RewardModelsRecipe(Section):
    """One data set, several ways to train a reward model on it, several seeds."""

    run_dir: str = "runs/reward_models"
    """Folder of all runs and evaluations, and of results.json, results.md and results.png."""
    data_path: str | None = None
    """File of the data, in place of the recipes' own; its rows are split as theirs."""
    sft: str | None = None
    """Recipe of launch/sft.py for the policy that a seed's reward models start from; null: what model.path names."""
    recipe: str = "tldr/smoke_reward_model.yaml"
    """Recipe of launch/reward_model.py that the variants override."""
    shared: list[str] = field(default_factory=list)
    """Settings of every run and of the evaluations' data, data.key=value."""
    variants: dict[str, list[str]] = field(default_factory=dict)
    """Name in the table -> settings on top; the others are compared to the first."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Training seeds; the seeds of a variant are also the members of its ensembles."""
    subsets: list[str] = field(default_factory=list)
    """Columns of the data by which the evaluations divide the pairs."""
    num_jobs: int = setting(2, ge=1)
    """Runs at a time, each on its share of the cores."""

    def check(self) -> None:
        is_wrong = len(self.seeds) < 2 or len(set(self.seeds)) < len(self.seeds)
        refuse(is_wrong, "seeds", f"must be two or more different numbers, for intervals, got {self.seeds}")
        foreign = [override for override in self.shared if not override.startswith("data.")]
        refuse(bool(foreign), "shared", f"is for the data alone, data.key=value, got {foreign[:1]}")
        root = Path(self.run_dir)
        folders = [evaluation_dir(root, name) for name in self.variants]
        folders += [sft_dir(root, seed) for seed in self.seeds]
        folders += [model_dir(root, name, seed) for name in self.variants for seed in self.seeds]
        twice = sorted({folder.name for folder in folders if folders.count(folder) > 1})
        refuse(
            bool(twice), "variants", f"need different folders, and two have {twice[:1]}; choose other names"
        )

    @property
    def data(self) -> list[str]:
        """The settings of the data, key=value."""
        return [*self.shared, *([f"data.path={self.data_path}"] if self.data_path else [])]


def run(recipe: RewardModelsRecipe) -> Path:
    """Run the grid, evaluate each variant, and write the results."""
    check(recipe)
    root = Path(recipe.run_dir)
    root.mkdir(parents=True, exist_ok=True)
    num_policies = len(recipe.seeds) if recipe.sft else 0
    num_runs = num_policies + len(recipe.variants) * (len(recipe.seeds) + 1)
    with RunGrid(recipe.num_jobs, num_runs) as grid:
        needs, start = {}, {}
        for seed in recipe.seeds if recipe.sft else []:
            folder = sft_dir(root, seed)
            needs[seed] = [grid.launch("sft", recipe.sft, folder, [f"seed={seed}", *recipe.data])]
            start[seed] = [f"model.path={folder}/policy"]
        for name, overrides in recipe.variants.items():
            models = []
            for seed in recipe.seeds:
                settings = [f"seed={seed}", *recipe.data, *start.get(seed, []), *overrides]
                folder = model_dir(root, name, seed)
                models.append(
                    grid.launch("reward_model", recipe.recipe, folder, settings, needs.get(seed, ()))
                )
            evaluation = write_evaluation_recipe(recipe, root, name)
            grid.launch("evaluate_reward_model", str(evaluation), evaluation_dir(root, name), [], models)
    evaluations = {
        name: json.loads((evaluation_dir(root, name) / FILE).read_text()) for name in recipe.variants
    }
    _check_same_pairs(evaluations)
    results = [summary(recipe, root, name, evaluation) for name, evaluation in evaluations.items()]
    path = write_results(root, results, markdown(results))
    _plot(results, root / "results.png")
    return path


def check(recipe: RewardModelsRecipe) -> None:
    """Raise ConfigError, naming the variant, for settings that would fail late or change what is held out."""
    if not recipe.variants:
        raise ConfigError("variants is empty; give at least one, with settings of the reward model or []")
    for name, overrides in recipe.variants.items():
        common = [o for o in overrides if o.startswith(COMMON) and not o.startswith(OWN_DATA)]
        if common:
            raise ConfigError(
                f"variants.{name}: {common[0]} belongs in shared, seeds or run_dir: variants have these in common"
            )
        try:
            load_recipe(RewardModelRecipe, find_recipe(recipe.recipe), [*recipe.data, *overrides])
        except ConfigError as error:
            raise ConfigError(f"variants.{name}: {error}") from None


def sft_dir(root: Path, seed: int) -> Path:
    """Return the folder of the SFT run of a seed."""
    return root / f"sft_{seed}"


def model_dir(root: Path, name: str, seed: int) -> Path:
    """Return the folder of the run of a variant and seed."""
    return root / f"{slug(name)}_{seed}"


def evaluation_dir(root: Path, name: str) -> Path:
    """Return the folder of a variant's evaluation."""
    return root / f"evaluation_{slug(name)}"


def write_evaluation_recipe(recipe: RewardModelsRecipe, root: Path, name: str) -> Path:
    """Write the recipe that evaluates all seeds of a variant, alone and together, and return its path."""
    trained = load_recipe(
        RewardModelRecipe, find_recipe(recipe.recipe), [*recipe.data, *recipe.variants[name]]
    )
    has_zero = trained.score.num_references > 0
    settings = {
        "models": [
            {"name": f"seed {seed}", "path": f"{model_dir(root, name, seed)}/reward_model"}
            for seed in recipe.seeds
        ],
        "ensembles": ENSEMBLES if has_zero else ENSEMBLES[:1],
        "data": asdict(trained.data),
        "subsets": list(recipe.subsets),
        "num_references": 0,
        "num_alone": 8,
    }
    path = root / f"evaluation_{slug(name)}.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def _check_same_pairs(evaluations: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ConfigError for a variant that was evaluated on other pairs than the first, as by another tokenizer."""
    hashes = {name: evaluation["data"]["pairs_sha256"] for name, evaluation in evaluations.items()}
    first = next(iter(hashes))
    for name, found in hashes.items():
        if found != hashes[first]:
            raise ConfigError(
                f"variants.{name}: its tokenizer leaves other pairs than that of {first}, so they cannot be compared; "
                "raise data.max_prompt_length and data.max_response_length, or take another model"
            )


# --- results ----------------------------------------------------------------------------------------------


def summary(
    recipe: RewardModelsRecipe, root: Path, name: str, evaluation: Mapping[str, Any]
) -> dict[str, Any]:
    """Collect a variant's numbers: of its evaluation, and of its runs, one a seed."""
    models = evaluation["models"]
    found = {
        "variant": name,
        "num_pairs": evaluation["data"]["num_pairs"],
        "num_prompts": evaluation["data"]["num_prompts"],
        "accuracy": evaluation["accuracy_over_models"],
        "ece": [model["calibration"]["ece"] for model in models],
        "chance_ece_high": [model["calibration"]["chance_ece_high"] for model in models],
        "log_loss": [model["calibration"]["log_loss"]["value"] for model in models],
        "temperature": [model["calibration"]["temperature"] for model in models],
        "partial_correlation": [model["length"]["partial_correlation"] for model in models],
        "length_judge": models[0]["length"]["length_judge"]["accuracy"],
        "agreement": [pair["signs"]["kappa"] for pair in evaluation["agreement"]],
        "ensembles": [
            {key: ensemble[key] for key in ("name", "gain")} | {"accuracy": ensemble["accuracy"]["accuracy"]}
            for ensemble in evaluation["ensembles"]
        ],
        "by_gap": [model["score_gaps"] for model in models],
        "reliability": [model["calibration"]["bins"] for model in models],
        "minutes": [sum(metric(model_dir(root, name, seed), "time/update")) / 60 for seed in recipe.seeds],
        "steps": [len(metric(model_dir(root, name, seed), "train/loss")) for seed in recipe.seeds],
    }
    first = next(iter(recipe.variants))
    accuracies = [prompt_accuracies(evaluation_dir(root, each), recipe.seeds) for each in (name, first)]
    return found | {"difference": None if name == first else difference(*accuracies)}


def difference(others: NDArray[np.float64], first: NDArray[np.float64]) -> dict[str, Any] | None:
    """Compare accuracies (S, P) of two variants on the same prompts; None where they have no interval."""
    if others.shape[1] < 2 or (np.ptp(others) == 0 and np.ptp(first) == 0):
        return None
    return asdict(seed_difference(others, first))


def prompt_accuracies(folder: Path, seeds: Sequence[int]) -> NDArray[np.float64]:
    """Return the accuracy (S, P) of each seed on the pairs of each prompt, from an evaluation's scores."""
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    codes = prompt_codes([line["prompt_id"] for line in lines], len(lines))
    names = [f"seed {seed}" for seed in seeds]
    margins = [
        [line["models"][name]["chosen"] - line["models"][name]["rejected"] for line in lines]
        for name in names
    ]
    return np.stack([prompt_means(outcomes(values), codes) for values in margins])


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Format the table: a row a variant, a second table for the ensembles of its seeds."""
    first = results[0]
    rows = [
        {
            "reward model": found["variant"],
            "accuracy": _limits(found["accuracy"]),
            f"less {first['variant']}": _limits(found["difference"], "difference"),
            "ECE": _over_seeds(found["ece"]),
            "log loss": _over_seeds(found["log_loss"]),
            "temperature": _over_seeds(found["temperature"]),
            "length, partial": _over_seeds(found["partial_correlation"]),
            "steps": " ".join(map(str, sorted(set(found["steps"])))),
            "minutes": _over_seeds(found["minutes"], 1),
        }
        for found in results
    ]
    members = [
        {
            "ensemble": f"{found['variant']}: {ensemble['name']}",
            "accuracy": _limits(ensemble["accuracy"]),
            "gain over a member": _limits(ensemble["gain"]),
        }
        for found in results
        for ensemble in found["ensembles"]
    ]
    facts = (
        f"{first['num_pairs']} held-out pairs of {first['num_prompts']} prompts. Preferring the longer response is "
        f"right on {_limits(first['length_judge'])}.\n"
    )
    return "\n".join([markdown_table(rows), facts, markdown_table(members)])


def _limits(found: Mapping[str, float] | None, value: str = "value") -> str:
    if found is None:
        return "-"
    return f"{found[value]:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _over_seeds(values: Sequence[float | None], digits: int = 3) -> str:
    """Format mean and 95% t-interval over seeds; a seed may have no value."""
    if None in values:
        return f"none in {values.count(None)} of {len(values)} seeds"
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def _plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot accuracy by the data's score gap where it has one, and reliability: means over seeds, each seed thinly."""
    has_gaps = results[0]["by_gap"][0] is not None
    figure = Figure(figsize=(5 + 5 * has_gaps, 4), layout="constrained")
    axes = figure.subplots(1, 1 + has_gaps, squeeze=False)[0]
    axes[-1].plot([0.5, 1], [0.5, 1], color="grey", linestyle="--", label="calibrated")
    for number, found in enumerate(results):
        color = f"C{number}"
        for index, bins in enumerate(found["reliability"]):
            x, y = ([each[name] for each in bins] for name in ("confidence", "accuracy"))
            label = found["variant"] if index == 0 else None
            axes[-1].plot(x, y, marker="o", markersize=3, linewidth=0.8, color=color, label=label)
        if has_gaps:
            names = list(found["by_gap"][0])
            runs = [[groups[name]["accuracy"]["value"] for name in names] for groups in found["by_gap"]]
            axes[0].plot(names, np.mean(runs, axis=0), marker="o", color=color, label=found["variant"])
            for values in runs:
                axes[0].plot(names, values, color=color, linewidth=0.5, alpha=0.5)
    axes[-1].set_xlabel("confidence, sigmoid(|margin|)")
    axes[-1].set_ylabel("share of pairs that are right")
    axes[-1].legend()
    if has_gaps:
        axes[0].axhline(0.5, color="grey", linestyle="--")
        axes[0].set_xlabel("gap of people's scores")
        axes[0].set_ylabel("accuracy")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(RewardModelsRecipe, "tldr/smoke_reward_models.yaml", run)
