"""Compare methods on real text from one pretrained policy: SFT, reward models and methods by seed.

    python launch/experiments/smollm.py smollm/seeds_tldr.yaml data_path=posts.jsonl judge_data_path=other_posts.jsonl

Each stage is a launch script on a recipe, and one comparison follows. Finished stages are skipped, so the same command
resumes after a kill. The judge is a second reward model: another seed, from another SFT policy, on other posts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parents[1])

import numpy as np
import yaml
from matplotlib.figure import Figure

from drpo.config import ConfigError, Section, load_recipe, refuse, setting
from drpo.data.load import read_records
from drpo.data.records import Record
from drpo.trainers.online_recipe import OnlineRecipe
from drpo.trainers.preference.recipe import PreferenceRecipe
from drpo.trainers.sft import SFTRecipe
from eval.comparing.recipe import CompareRecipe, slug
from launch.command_line import StageFailed, find_recipe, main
from launch.experiments.results import metric, plot_seeds
from launch.experiments.seed_grid import RunGrid, chosen
from reward_models.train import RewardModelRecipe

STAGES = {
    "sft": SFTRecipe,
    "reward_model": RewardModelRecipe,
    "dpo": PreferenceRecipe,
    "ppo": OnlineRecipe,
    "drpo": OnlineRecipe,
}
CURVES = (
    "train/loss",
    "train/accuracy",
    "objective/score",
    "objective/kl_k3_per_token",
    "objective/sampled_length",
    "objective/sampled_tokens",
    "objective/ended",
    "reset/prefix_fraction",
    "reset/position",
    "value/explained_variance",
)
SPLIT = ("data.eval_", "data.split_seed", "data.train_split", "data.limit")


@dataclass(frozen=True)
class StageConfig(Section):
    """A stage of the chain: a launch script, its recipe and overrides."""

    script: str = ""
    """Name of the launch script: sft, dpo, ppo, ..."""
    recipe: str = ""
    """Its recipe."""
    overrides: list[str] = field(default_factory=list)
    """Settings on top, key=value."""


@dataclass(frozen=True)
class SmolLMExperimentRecipe(Section):
    """One task, several methods, several seeds."""

    run_dir: str = "runs/smollm/experiment"
    """Folder of all runs and of the comparison."""
    data_path: str | None = None
    """File with the rows for policies, reward model and evaluation."""
    judge_data_path: str | None = None
    """File with other rows, for the reward model that judges."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Training seeds; each has its own SFT policy."""
    shared: list[str] = field(default_factory=list)
    """Settings of all training stages, key=value."""
    sft: StageConfig = field(default_factory=StageConfig)
    """Where every seed starts."""
    reward_model: StageConfig = field(default_factory=StageConfig)
    """Trained once from the SFT policy of the first seed, and for the judge from that of the second. Critics start from
    it, unless a method has critic.path=null."""
    methods: dict[str, StageConfig] = field(default_factory=dict)
    """Name in the table -> stage."""
    only: list[str] = field(default_factory=list)
    """Names of the methods to run and to compare; empty for all."""
    online: list[str] = field(default_factory=list)
    """Settings of all online methods, before their own, key=value."""
    compare: StageConfig = field(default_factory=StageConfig)
    """The comparison; its systems are the methods."""
    num_jobs: int = setting(2, ge=1)
    """Runs at a time, each on its share of the cores."""

    def check(self) -> None:
        is_wrong = len(self.seeds) < 2 or len(set(self.seeds)) < len(self.seeds)
        refuse(is_wrong, "seeds", f"must be two or more different numbers, for intervals, got {self.seeds}")
        folders = ["sft", "reward_model", "judge", "compare", *map(slug, self.methods)]
        repeated = [folder for folder in folders if folders.count(folder) > 1]
        rule = f"must not have two runs in one folder, {', '.join(repeated[:1])}; choose another name"
        refuse(bool(repeated), "methods", rule)
        chosen(self.methods, self.only)

    @property
    def shown(self) -> dict[str, StageConfig]:
        """The methods that are run, in their order."""
        return chosen(self.methods, self.only)


def run(recipe: SmolLMExperimentRecipe) -> Path:
    """Run the stages, seed by seed, then compare the results."""
    check(recipe)
    root = Path(recipe.run_dir)
    root.mkdir(parents=True, exist_ok=True)
    first, second = recipe.seeds[:2]
    scorer = root / "reward_model" / "reward_model"
    with RunGrid(recipe.num_jobs, len(recipe.seeds) * (1 + len(recipe.shown)) + 2) as grid:

        def train(
            stage: StageConfig, folder: Path, path: str, seed: int, needs: list[Future], *settings: str
        ) -> Future:
            data = [f"data.path={path}", f"seed={seed}"]
            overrides = [*settings_of(recipe, stage), *data, *settings]
            return grid.launch(stage.script, stage.recipe, folder, overrides, needs)

        def start(seed: int) -> str:
            return f"model.path={sft_dir(root, seed)}/policy"

        sft: dict[int, Future] = {}
        for seed in recipe.seeds:
            sft[seed] = train(recipe.sft, sft_dir(root, seed), recipe.data_path, seed, [])
            if seed == second:  # here, so that methods need not wait for the SFT policies of all seeds
                stage, path = recipe.reward_model, recipe.data_path
                reward_model = train(stage, scorer.parent, path, first, [sft[first]], start(first))
                path = recipe.judge_data_path
                train(stage, root / "judge", path, second, [sft[second]], start(second))
        for seed in recipe.seeds:
            for name, stage in recipe.shown.items():
                needs, settings = [sft[seed]], [start(seed)]
                if STAGES[stage.script] is OnlineRecipe:
                    needs.append(reward_model)
                    settings.append(f"reward.path={scorer}")
                    if load_stage(recipe, f"methods.{name}", stage).critic.path is not None:
                        settings.append(f"critic.path={scorer}")
                folder = method_dir(root, name, seed)
                train(stage, folder, recipe.data_path, seed, needs, *settings)
    return compare(recipe, root)


def check(recipe: SmolLMExperimentRecipe) -> None:
    """Raise ConfigError for settings that would fail late, or leak evaluation data into training."""
    if recipe.data_path is None or recipe.judge_data_path is None:
        raise ConfigError(
            "data_path and judge_data_path: give a file each, with different rows (docs/experiments.md)"
        )
    if not recipe.methods:
        raise ConfigError("methods is empty; give at least one")
    prompts, judge_prompts = (
        {record.shared_prompt: record.origin for record in records_of(recipe, path)}
        for path in (recipe.data_path, recipe.judge_data_path)
    )
    if shared := prompts.keys() & judge_prompts.keys():
        raise ConfigError(
            f"judge_data_path: {len(shared)} of its prompts are in data_path too, such as "
            f"{judge_prompts[min(shared)]}, so the judge would know what it judges; give other rows"
        )
    stages = {"sft": recipe.sft, "reward_model": recipe.reward_model}
    stages |= {f"methods.{name}": stage for name, stage in recipe.methods.items()}
    _check_split("online", recipe.online)
    for name, stage in stages.items():
        if stage.script not in STAGES:
            raise ConfigError(f"{name}.script must be one of {', '.join(STAGES)}, got {stage.script!r}")
        _check_split(f"{name}.overrides", stage.overrides)
        load_stage(recipe, name, stage)
    comparison = _load(CompareRecipe, "compare", recipe.compare, compare_overrides(recipe))
    if comparison.judging.judge.kind != "reward_model":
        raise ConfigError(
            "compare: its judge is the second reward model, so judging.judge.kind must be reward_model"
        )


def _check_split(place: str, overrides: Sequence[str]) -> None:
    if split := [override for override in overrides if override.startswith(SPLIT)]:
        raise ConfigError(f"{place}: {split[0]} belongs in shared: all stages hold the same rows out")


def records_of(recipe: SmolLMExperimentRecipe, path: str) -> list[Record]:
    """Read the rows of a file as all stages do, except for the chat template."""
    data = _load(SFTRecipe, "sft", recipe.sft, [*recipe.shared, *recipe.sft.overrides]).data
    return read_records(replace(data, path=path), data.train_split, "prompts", None, [])


def settings_of(recipe: SmolLMExperimentRecipe, stage: StageConfig) -> list[str]:
    """Return the overrides of a training stage: those of all stages, of all online ones, and its own."""
    online = recipe.online if STAGES[stage.script] is OnlineRecipe else []
    return [*recipe.shared, *online, *stage.overrides]


def load_stage(recipe: SmolLMExperimentRecipe, name: str, stage: StageConfig) -> Any:
    """Load the recipe of a training stage with its settings; raise ConfigError, naming `name`, for bad ones."""
    return _load(STAGES[stage.script], name, stage, settings_of(recipe, stage))


def _load(recipe_class: type, name: str, stage: StageConfig, overrides: list[str]) -> Any:
    try:
        return load_recipe(recipe_class, find_recipe(stage.recipe), overrides)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def compare_overrides(recipe: SmolLMExperimentRecipe) -> list[str]:
    """Return the comparison's overrides: it evaluates on the prompts that the stages hold out."""
    data = [f"complete.{override}" for override in recipe.shared if override.startswith("data.")]
    return [*data, *recipe.compare.overrides]


def sft_dir(root: Path, seed: int) -> Path:
    """Return the folder of a seed's SFT run."""
    return root / f"sft_{seed}"


def method_dir(root: Path, name: str, seed: int) -> Path:
    """Return the folder of the run of a method and seed."""
    return root / f"{slug(name)}_{seed}"


def training_curves(folders: Sequence[Path]) -> dict[str, list[list[float]]]:
    """Read some metrics of each run, step by step."""
    curves = {key: [metric(folder, key) for folder in folders] for key in CURVES}
    return {key: runs for key, runs in curves.items() if any(runs)}


def scores_by_tokens(
    training: Mapping[str, Mapping[str, list[list[float]]]],
) -> dict[str, tuple[np.ndarray, list[list[float]]]]:
    """Return of every online method, by seed and step, the tokens sampled until then and the rollouts' score."""
    return {
        name: (np.cumsum(curves["objective/sampled_tokens"], axis=1), curves["objective/score"])
        for name, curves in training.items()
        if "objective/score" in curves
    }


def plot_training(training: Mapping[str, Mapping[str, list[list[float]]]], path: Path) -> None:
    """Plot `scores_by_tokens`, mean and range over seeds; without online methods there is no plot."""
    online = scores_by_tokens(training)
    if not online:
        return
    figure = Figure(figsize=(6.5, 4.2))
    axis = figure.subplots()
    for name, (tokens, scores) in online.items():
        plot_seeds(axis, tokens / 1000, scores, name)
    axis.set_xlabel("sampled tokens (thousands)")
    axis.set_ylabel("score of the rollouts (mean and range over seeds)")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def compare(recipe: SmolLMExperimentRecipe, root: Path) -> Path:
    """Run the comparison, keep its numbers, without the texts, as results.json, and plot training of online runs."""
    settings: dict[str, Any] = yaml.safe_load(find_recipe(recipe.compare.recipe).read_text())
    systems = {"SFT": [sft_dir(root, seed) for seed in recipe.seeds]}
    systems |= {name: [method_dir(root, name, seed) for seed in recipe.seeds] for name in recipe.shown}
    references = [f"{sft_dir(root, seed)}/policy" for seed in recipe.seeds]
    settings["systems"] = [
        {"name": name, "policies": [f"{folder}/policy" for folder in folders], "kl_references": references}
        for name, folders in systems.items()
    ]
    settings.pop("kl_reference", None)
    settings["run_dir"] = str(root / "compare")
    settings["reward_model"] = str(root / "reward_model" / "reward_model")
    settings["judging"]["judge"]["path"] = str(root / "judge" / "reward_model")
    settings["complete"]["data"]["path"] = recipe.data_path
    path = root / "compare.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    script = HERE.parent / f"{recipe.compare.script}.py"
    command = [sys.executable, str(script), str(path), *compare_overrides(recipe)]
    if code := subprocess.run(command).returncode:
        raise StageFailed(f"{' '.join(command)} failed with code {code}, for the reason above")
    comparison = json.loads((root / "compare" / "comparison.json").read_text())
    numbers = {key: comparison[key] for key in ("measures", "systems", "tests", "frontiers")}
    numbers["training"] = {name: training_curves(folders) for name, folders in systems.items()}
    (root / "results.json").write_text(json.dumps(numbers, indent=1))
    plot_training(numbers["training"], root / "training.png")
    return root / "compare" / "report.html"


if __name__ == "__main__":
    main(SmolLMExperimentRecipe, "smollm/seeds_tldr.yaml", run)
