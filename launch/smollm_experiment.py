"""Every method on real text from one pretrained policy: SFT, reward models and methods by seed, then one comparison.

    python launch/smollm_experiment.py smollm/seeds_tldr.yaml data=posts.jsonl judge_data=other_posts.jsonl

Each stage is a launch script on a recipe; what has finished is not run again, so the same command goes on after a
kill. The judge is a second reward model: of another seed, from another SFT policy, on other posts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

import yaml
from rich.progress import Progress

from drpo.config import ConfigError
from launch.command_line import find_recipe, main
from launch.compare_recipe import slug
from launch.seed_grid import launch_once


@dataclass(frozen=True)
class StageConfig:
    """A stage of the chain: a launch script, its recipe and what differs from it."""

    script: str = "dpo"
    """Name of the launch script."""
    recipe: str = ""
    """Its recipe."""
    overrides: list[str] = field(default_factory=list)
    """Settings on top, key=value."""


@dataclass(frozen=True)
class SmolLMExperimentRecipe:
    """One task, several methods, several seeds."""

    run_dir: str = "runs/smollm/experiment"
    """Folder of all runs and of the comparison."""
    data: str | None = None
    """File with the rows for policies, reward model and evaluation."""
    judge_data: str | None = None
    """File with other rows, for the reward model that judges."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Training seeds; each has its own SFT policy."""
    shared: list[str] = field(default_factory=list)
    """Settings of all training stages, key=value."""
    sft: StageConfig = field(default_factory=StageConfig)
    """Where every seed starts."""
    reward_model: StageConfig = field(default_factory=StageConfig)
    """Trained once from the SFT policy of the first seed, and for the judge from that of the second."""
    methods: dict[str, StageConfig] = field(default_factory=dict)
    """Name in the table -> stage."""
    compare: StageConfig = field(default_factory=StageConfig)
    """The comparison; its systems are the methods."""
    num_jobs: int = 2
    """Runs at a time, each on its share of the cores."""

    def __post_init__(self) -> None:
        if len(self.seeds) < 2 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be two or more different numbers, for intervals, got {self.seeds}")
        if self.num_jobs < 1:
            raise ValueError(f"num_jobs must be >= 1, got {self.num_jobs}")


def run(recipe: SmolLMExperimentRecipe) -> Path:
    """Make the runs, seed by seed, then compare what is there."""
    if recipe.data is None or recipe.judge_data is None:
        raise ConfigError("data and judge_data: give a file each, with different rows (docs/experiments.md)")
    if not recipe.methods:
        raise ConfigError("methods: give at least one")
    root = Path(recipe.run_dir)
    root.mkdir(parents=True, exist_ok=True)
    first, second = recipe.seeds[:2]
    with Progress() as progress, ThreadPoolExecutor(recipe.num_jobs) as pool:
        task = progress.add_task("runs", total=len(recipe.seeds) * (1 + len(recipe.methods)) + 2)

        def submit(stage: StageConfig, folder: Path, needs: list[Future], *settings: str) -> Future:
            return pool.submit(train, stage, folder, needs, settings)

        def train(stage: StageConfig, folder: Path, needs: list[Future], settings: tuple[str, ...]) -> None:
            for need in needs:  # submitted before this one, so that waiting for it cannot block the pool
                need.result()
            overrides = [*recipe.shared, *stage.overrides, *settings]
            launch_once(stage.script, stage.recipe, folder, overrides, recipe.num_jobs)
            progress.advance(task)

        def rows(path: str, seed: int) -> tuple[str, str]:
            return f"data.path={path}", f"seed={seed}"

        def start(seed: int) -> str:
            return f"model.path={sft_dir(root, seed)}/policy"

        sft: dict[int, Future] = {}
        scorers: list[Future] = []
        for seed in recipe.seeds:
            sft[seed] = submit(recipe.sft, sft_dir(root, seed), [], *rows(recipe.data, seed))
            if seed == second:
                for name, path, of in (
                    ("reward_model", recipe.data, first),
                    ("judge", recipe.judge_data, second),
                ):
                    scorer = submit(recipe.reward_model, root / name, [sft[of]], *rows(path, of), start(of))
                    scorers.append(scorer)
        jobs = [*sft.values(), *scorers]
        for seed in recipe.seeds:
            for name, stage in recipe.methods.items():
                needs, settings = [sft[seed]], [*rows(recipe.data, seed), start(seed)]
                if stage.script != "dpo":
                    needs.append(scorers[0])
                    path = root / "reward_model" / "reward_model"
                    settings += [f"reward.path={path}", f"critic.path={path}"]
                jobs.append(submit(stage, method_dir(root, name, seed), needs, *settings))
        for job in jobs:
            job.result()
    return compare(recipe, root)


def sft_dir(root: Path, seed: int) -> Path:
    """The SFT run of a seed."""
    return root / f"sft_{seed}"


def method_dir(root: Path, name: str, seed: int) -> Path:
    """The run of a method and seed."""
    return root / f"{slug(name)}_{seed}"


def compare(recipe: SmolLMExperimentRecipe, root: Path) -> Path:
    """Run the comparison, and keep its numbers, without the texts, as results.json."""
    settings: dict[str, Any] = yaml.safe_load(find_recipe(recipe.compare.recipe).read_text())
    systems = {"SFT": [sft_dir(root, seed) for seed in recipe.seeds]}
    systems |= {name: [method_dir(root, name, seed) for seed in recipe.seeds] for name in recipe.methods}
    references = [f"{sft_dir(root, seed)}/policy" for seed in recipe.seeds]
    settings["systems"] = [
        {"name": name, "policies": [f"{folder}/policy" for folder in folders], "kl_references": references}
        for name, folders in systems.items()
    ]
    settings.pop("kl_reference", None)
    settings["run_dir"] = str(root / "compare")
    settings["reward_model"] = str(root / "reward_model" / "reward_model")
    settings["judging"]["judge"]["path"] = str(root / "judge" / "reward_model")
    settings["complete"]["data"]["path"] = recipe.data
    path = root / "compare.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    command = [
        sys.executable,
        str(HERE / f"{recipe.compare.script}.py"),
        str(path),
        *recipe.compare.overrides,
    ]
    subprocess.run(command, check=True)
    found = json.loads((root / "compare" / "comparison.json").read_text())
    numbers = {key: found[key] for key in ("measures", "systems", "tests", "frontiers")}
    (root / "results.json").write_text(json.dumps(numbers, indent=1))
    return root / "compare" / "report.html"


if __name__ == "__main__":
    main(SmolLMExperimentRecipe, "smollm/seeds_tldr.yaml", run)
