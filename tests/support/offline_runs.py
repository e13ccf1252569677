"""Whole SFT, reward-model and preference runs in this process, on data of ragged lengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from online_runs import forget_precision, merged

from drpo.config import load_recipe
from drpo.data.tasks.demo import true_rewards
from drpo.engine import Engine
from drpo.run.metrics import read_metrics, reproducible
from drpo.trainers import sft
from drpo.trainers.preference import train as preference
from drpo.trainers.preference.recipe import PreferenceRecipe
from reward_models import train as reward_model

RECIPE = {
    "num_steps": 3,
    "data": {"task": "demo", "demo": {"num_train": 40, "num_eval": 11}},
    "model": {
        "architecture": {
            "model_type": "gpt_neox",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
        },
        "vocab_size": 300,
    },
    "batch": {"size": 8, "microbatch_size": 3},
    "optim": {"learning_rate": 1e-2},
    "log": {"samples_every": 0},
    "checkpoint": {"every": 0},
    "engine": {"trackers": [], "mixed_precision": "no"},
}
SFT = merged(RECIPE, {"sample": {"num_prompts": 0}})
PREFERENCE = {name: part for name, part in SFT.items() if name not in ("data", "model")}


def run_sft(run_dir: Path, **changes) -> tuple[sft.SFTRecipe, list[dict[str, float]]]:
    """The resolved recipe and the metrics of an SFT run."""

    def train(recipe: sft.SFTRecipe, engine: Engine) -> Path:
        return sft.train(recipe, engine, dict.fromkeys(recipe.sample.reward_functions, true_rewards))

    return run_offline(sft.SFTRecipe, train, run_dir, merged(SFT, changes))


def run_reward_model(
    run_dir: Path, policy: Path | None = None, **changes
) -> tuple[reward_model.RewardModelRecipe, list[dict[str, float]]]:
    """The resolved recipe and the metrics of a reward-model run, from scratch or from the policy of a folder."""
    recipe = RECIPE if policy is None else {**RECIPE, "model": {"path": str(policy)}}
    return run_offline(reward_model.RewardModelRecipe, reward_model.train, run_dir, merged(recipe, changes))


def run_preference(
    policy: Path, run_dir: Path, data: dict | None = None, **changes
) -> tuple[PreferenceRecipe, list[dict[str, float]]]:
    """The resolved recipe and the metrics of a preference run that starts from the policy of a folder."""

    def train(recipe: PreferenceRecipe, engine: Engine) -> Path:
        return preference.train(recipe, engine, dict.fromkeys(recipe.sample.reward_functions, true_rewards))

    given = {"model": {"path": str(policy)}, "data": data or RECIPE["data"]}
    return run_offline(PreferenceRecipe, train, run_dir, merged(merged(PREFERENCE, given), changes))


def reproducible_rows(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Metrics without the times and the like."""
    return [reproducible(row) for row in rows]


def run_offline(recipe_class: type, train: Callable[[Any, Engine], Path], run_dir: Path, settings: dict):
    """The resolved recipe and the metrics of a run of these settings."""
    forget_precision()
    recipe_file = run_dir.with_suffix(".yaml")
    recipe_file.write_text(yaml.safe_dump({**settings, "run_dir": str(run_dir)}))
    recipe = load_recipe(recipe_class, recipe_file, [])
    engine = Engine(recipe.engine, run_dir, recipe.seed, recipe.optim.max_grad_norm)
    try:
        train(recipe, engine)
    finally:
        forget_precision()
    return recipe, read_metrics(run_dir / "metrics.jsonl")
