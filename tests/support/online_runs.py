"""Whole runs of the online loop in this process, on a policy of a few thousand weights."""

from __future__ import annotations

from pathlib import Path

import yaml
from accelerate.state import AcceleratorState

from drpo.config import load_recipe
from drpo.data.load import DataConfig, load_texts
from drpo.data.tasks.demo import DemoConfig, true_rewards
from drpo.engine import Engine
from drpo.models.loading import ModelConfig, load_policy
from drpo.models.tokenizer import train_tokenizer
from drpo.rewards import RewardFn
from drpo.run.metrics import read_metrics
from drpo.trainers.online import train
from drpo.trainers.online_recipe import OnlineRecipe

DEMO = {"num_train": 24, "num_eval": 6}  # less than two batches: passes end inside batches
RECIPE = {
    "num_steps": 3,
    "data": {"task": "demo", "demo": DEMO},
    "reward": {"function": "drpo.data.tasks.demo:true_rewards"},
    "reset": {"proportion": 0.5},
    "rollout": {"batch_size": 16, "max_response_length": 8, "sampling": {"temperature": 1.0}},
    "ppo": {"num_epochs": 2, "num_minibatches": 2, "microbatch_size": 4},
    "optim": {"learning_rate": 1e-3},
    "eval": {"every": 0},
    "log": {"samples_every": 0},
    "checkpoint": {"every": 0},
    "engine": {"trackers": [], "mixed_precision": "no"},
}


def save_tiny_policy(folder: Path, hidden_size: int = 32) -> None:
    """A random GPT-NeoX with its tokenizer."""
    tokenizer = train_tokenizer(load_texts(DataConfig(demo=DemoConfig(**DEMO))), vocab_size=300)
    architecture = {
        "model_type": "gpt_neox",
        "hidden_size": hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    config = ModelConfig(architecture=architecture, vocab_size=300)
    load_policy(config, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_online(
    policy: Path, run_dir: Path, changes: dict, reward_fn: RewardFn = true_rewards
) -> list[dict[str, float]]:
    """Train RECIPE with `changes` from the policy of a folder; the rows of its metrics."""
    forget_precision()
    given = {"run_dir": str(run_dir), "model": {"path": str(policy)}}
    recipe_file = run_dir.with_suffix(".yaml")
    recipe_file.write_text(yaml.safe_dump(merged(merged(RECIPE, given), changes)))
    recipe = load_recipe(OnlineRecipe, recipe_file, [])
    engine = Engine(recipe.engine, run_dir, recipe.seed, recipe.optim.max_grad_norm)
    train(recipe, engine, reward_fn, {})
    return read_metrics(run_dir / "metrics.jsonl")


def forget_precision() -> None:
    """accelerate keeps one precision a process; without this a second one is an error."""
    AcceleratorState._reset_state(reset_partial_state=True)


def merged(base: dict, changes: dict) -> dict:
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result
