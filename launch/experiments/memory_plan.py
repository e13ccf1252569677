"""Hold the plan of a run's memory (drpo plan) against the memory that the run takes, on a CPU.

    python launch/experiments/memory_plan.py [recipe.yaml] [key=value ...]

Every case is a real run in processes of its own, launch/<command>.py on random weights and rows of one length. Measured
is the peak resident memory of the second step, less that of the same run on a model of next to no size, which leaves
out interpreter and libraries; the plan's difference is formed alike.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parents[1])

import numpy as np
import yaml

from drpo.config import Section, load_recipe, refuse, setting
from drpo.models.loading import ModelConfig, load_policy
from drpo.models.tokenizer import train_tokenizer
from launch.cli import accelerate_config
from launch.command_line import main
from launch.experiments.measured_run import measure_run, write_rows
from launch.experiments.results import markdown_table, write_results
from launch.planning.gpus import GIB
from launch.planning.models import Precision
from launch.planning.phases import dry_step
from launch.planning.sharding import BUCKET, Sharding, device_memory
from launch.planning.stages import STAGES

WORDS: dict[str, dict[str, Any]] = {
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora": {"r": 16, "alpha": 32}},
    "4bit": {"load_in_4bit": True},
}
LAUNCHERS = {"cpu": Sharding(2), "zero2": Sharding(2, 2), "zero3": Sharding(2, 3)}
"Accelerate configs of two processes."
COMMANDS = ("sft", "reward_model", "dpo", "ppo")
CASES = (
    *("sft", "sft checkpointing", "sft lora", "reward_model", "dpo", "dpo checkpointing", "dpo lora", "ppo"),
    *("ppo checkpointing", "ppo lora", "sft cpu", "sft zero2", "sft zero3"),
)
TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
VOCABULARY = 2048
# Freed memory goes back to the system at once, so that resident memory is memory in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class MemoryPlanRecipe(Section):
    """The model, the rows and the cases."""

    run_dir: str = "runs/memory_plan"
    """Folder of the inputs, of every run, and of results.json and results.md."""
    cases: list[str] = field(default_factory=lambda: list(CASES))
    """A command (sft, reward_model, dpo, ppo), and any of checkpointing, lora, 4bit (with lora) and an accelerate
    config for two processes (cpu, zero2, zero3)."""
    hidden_size: int = setting(768, ge=32)
    """Width of the random llama."""
    num_layers: int = setting(10, ge=1)
    """Its layers."""
    vocab_size: int = setting(16384, ge=VOCABULARY)
    """Rows of its embedding."""
    prompt_length: int = setting(192, ge=2)
    """Tokens of a prompt."""
    response_length: int = setting(64, ge=2)
    """Tokens of a response."""
    microbatch_size: int = setting(4, ge=1)
    """Rows of a forward; a step has two such micro-batches."""
    num_threads: int = setting(1, ge=1)
    """OMP_NUM_THREADS of every process."""
    seed: int = setting(0, ge=0)
    """Seed of rows and weights."""

    def check(self) -> None:
        known = {*WORDS, *LAUNCHERS}
        wrong = [
            case for case in self.cases if case.split()[0] not in COMMANDS or not {*case.split()[1:]} <= known
        ]
        rule = f"begin with one of {', '.join(COMMANDS)}, then some of {', '.join(known)}; got {wrong}"
        refuse(bool(wrong), "cases", rule)


def run(recipe: MemoryPlanRecipe) -> Path:
    """Run every case twice, on the model and on the tiny one, and write the table."""
    os.environ.update(MALLOC)
    root = Path(recipe.run_dir).resolve()
    make_inputs(recipe, root)
    rows = []
    for case in recipe.cases:
        measured, planned = (
            {size: of(recipe, root, case, size) for size in ("large", "tiny")} for of in (measure, plan)
        )
        row = {
            "case": case,
            "measured": measured["large"] - measured["tiny"],
            "planned": planned["large"] - planned["tiny"],
        }
        rows.append(row | {"ratio": row["planned"] / row["measured"]})
        print(f"{case}: measured {row['measured']:.3f} GiB, planned {row['planned']:.3f} GiB", flush=True)
    return write_results(root, {"rows": rows}, markdown(rows))


def make_inputs(recipe: MemoryPlanRecipe, root: Path) -> None:
    """Write both policies, and rows of random words that are one token each."""
    rng = np.random.default_rng(recipe.seed)
    words = [" " + "".join(letters) for letters in rng.choice(list("abcdefghijklmnopqrstuvwxyz"), (200, 6))]
    tokenizer = train_tokenizer(["".join(rng.choice(words, 50)) for _ in range(400)], VOCABULARY)
    words = [word for word in words if len(tokenizer.encode(word)) == 1]
    sizes = {
        "hidden_size": recipe.hidden_size,
        "intermediate_size": 4 * recipe.hidden_size,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": max(1, recipe.hidden_size // 64),
        "vocab_size": recipe.vocab_size,
    }
    for name, architecture in (("large", sizes), ("tiny", TINY)):
        config = ModelConfig(architecture={"model_type": "llama", **architecture}, vocab_size=VOCABULARY)
        load_policy(config, tokenizer, recipe.seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)

    def text(length: int) -> str:
        return "".join(rng.choice(words, length))

    length = recipe.response_length - 1  # and the stop token
    rows = [
        {
            "prompt": text(recipe.prompt_length - (row > 0)),
            **{name: text(length) for name in ("completion", "chosen", "rejected")},
        }
        for row in range(8 * recipe.microbatch_size)
    ]
    write_rows(root / "rows.jsonl", rows)
    (root / "memory_plan_reward.py").write_text(
        "def score(completions):\n    return [0.5 for _ in completions]\n"
    )


def settings_of(recipe: MemoryPlanRecipe, root: Path, case: str, size: str) -> dict[str, Any]:
    """Return the settings of a case's run on one of the models."""
    command, *words = case.split()
    batch_size = 2 * recipe.microbatch_size * _sharding(case).num_processes
    model = {"path": str(root / size)}
    for word in words:
        model |= WORDS.get(word, {})
    settings: dict[str, Any] = {
        "num_steps": 3,
        "data": {
            "task": "own",
            "path": str(root / "rows.jsonl"),
            "eval_fraction": 0,
            "max_prompt_length": recipe.prompt_length,
            "max_response_length": recipe.response_length,
        },
        "model": model,
        "log": {"samples_every": 0},
        "engine": {"mixed_precision": "no", "trackers": []},
    }
    if command == "ppo":
        settings |= {
            "reward": {"function": "memory_plan_reward:score", "shaping": {"missing_stop": "none"}},
            "reset": {"proportion": 0},
            "rollout": {
                "batch_size": batch_size,
                "generation_batch_size": recipe.microbatch_size,
                "max_response_length": recipe.response_length,
            },
            "ppo": {"num_epochs": 1, "microbatch_size": recipe.microbatch_size},
        }
    else:
        settings["batch"] = {"size": batch_size, "microbatch_size": recipe.microbatch_size}
    if command == "reward_model":
        settings["score"] = {"num_references": 0}
    elif command != "ppo":
        settings["sample"] = {"num_prompts": 0}
    return settings


def measure(recipe: MemoryPlanRecipe, root: Path, case: str, size: str) -> float:
    """Run the case; return the peak resident memory of its second and third step, GiB."""
    settings, script = settings_of(recipe, root, case, size), HERE.parent / f"{case.split()[0]}.py"
    launcher: list[str] = []
    for name in LAUNCHERS.keys() & set(case.split()):
        options = [
            "--config_file",
            str(accelerate_config(name)),
            "--num_processes",
            "2",
            "--main_process_port",
            "0",
        ]
        launcher = ["-m", "accelerate.commands.launch", *options, "--mixed_precision", "no"]
    folder = root / f"{case} {size}".replace(" ", "_")
    steps = measure_run(script, settings, folder, recipe.num_threads, launcher)
    return max(step["perf/peak_memory_gib"] for step in steps[1:])


def plan(recipe: MemoryPlanRecipe, root: Path, case: str, size: str) -> float:
    """Return what the plan says of the case, GiB."""
    settings = settings_of(recipe, root, case, size) | {
        "run_dir": str(root / "planned"),
        "eval": {"every": 0},
    }
    path = root / "planned.yaml"
    path.write_text(yaml.safe_dump(settings))
    planned, sharding = (
        load_recipe(STAGES[case.split()[0].replace("_", "-")].recipe, path, []),
        _sharding(case),
    )
    step = dry_step(planned, Precision(bf16=False, casts_weights=False), sharding.num_processes)
    num_trained = sum(weights.trained for weights in step.weights.values())
    # A buffer that is allocated but not filled is not resident: ZeRO-2's fills while activations go, and is given back.
    bucket = min(BUCKET, num_trained) if sharding.zero_stage == 3 else 0
    phases = device_memory(step.weights, step.phases, sharding, bucket)
    return max(sum(parts.values()) for parts in phases.values()) / GIB


def _sharding(case: str) -> Sharding:
    return next((sharding for name, sharding in LAUNCHERS.items() if name in case.split()), Sharding())


def markdown(rows: list[Mapping[str, Any]]) -> str:
    """Format the table."""
    return markdown_table(
        [
            {
                "run": row["case"],
                "measured, GiB": f"{row['measured']:.2f}",
                "planned, GiB": f"{row['planned']:.2f}",
                "planned / measured": f"{row['ratio']:.2f}",
            }
            for row in rows
        ]
    )


if __name__ == "__main__":
    main(MemoryPlanRecipe, "demo/memory_plan.yaml", run)
