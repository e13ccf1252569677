"""Measure what a frozen trunk saves: a step of DR-PO with LoRA on the top layers against all layers.

    python launch/experiments/trunk_speed.py [recipe.yaml] [key=value ...]

Every measurement is a separate process, launch/drpo.py on the same prompts, weights and random numbers; the settings
alternate, and each ratio is of measurements of one round. `baseline` names another checkout of the project, whose
launch/drpo.py then measures LoRA on all layers. Compared are the time of scoring and update together (the trunk
included), and the peak memory of the process.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parents[1])

import numpy as np

from drpo.config import ConfigError, Section, refuse, setting
from drpo.models.tokenizer import load_tokenizer
from launch.command_line import main
from launch.experiments.measured_run import measure_run, write_rows
from launch.experiments.results import markdown_table, median_and_range, write_results

COUNTED = ("time/trunk", "time/score", "time/update")
REWARD = "def score(completions):\n    return [float(len(c.response_ids)) for c in completions]\n"


@dataclass(frozen=True)
class TrunkSpeedRecipe(Section):
    """Settings of one comparison: a policy, the shape of a step, and the number of rounds."""

    run_dir: str = "runs/trunk_speed"
    """Folder of the inputs, of every measurement, and of results.json and results.md."""
    model: str = "smollm2"
    """Policy: a folder, a hub id, or the name of an installed one."""
    baseline: str | None = None
    """Another checkout of the project that runs LoRA on all layers; null: this one."""
    trainable_layers: list[int] = field(default_factory=lambda: [4, 2])
    """How many top layers train, a measurement each."""
    lora_rank: int = setting(16, ge=1)
    """Rank of all adapters."""
    prompt_length: int = 256
    """Tokens of every prompt."""
    response_length: int = 53
    """Most tokens of a response."""
    batch_size: int = 16
    """Rollouts of a step."""
    microbatch_size: int = 4
    """Rows per forward."""
    num_epochs: int = 4
    """Passes over the rollouts."""
    num_steps: int = setting(2, ge=2)
    """Steps of a measurement; the first is not counted."""
    num_repeats: int = setting(3, ge=1)
    """Rounds of measurements."""
    num_threads: int = setting(2, ge=1)
    """OMP_NUM_THREADS of every process."""
    seed: int = 0
    """Seed of prompts and rollouts."""

    def check(self) -> None:
        refuse(not self.trainable_layers, "trainable_layers", "is empty; name at least one number of layers")


def run(recipe: TrunkSpeedRecipe) -> Path:
    """Measure, compare, and write the table."""
    root = Path(recipe.run_dir).resolve()
    if Path(recipe.model).exists():  # every run has a folder of its own
        recipe = replace(recipe, model=str(Path(recipe.model).resolve()))
    make_inputs(recipe, root)
    settings: list[int | None] = [None, *recipe.trainable_layers]
    measured: dict[int | None, list[dict[str, float]]] = {layers: [] for layers in settings}
    for repeat in range(recipe.num_repeats):
        for layers in settings if repeat % 2 == 0 else settings[::-1]:
            measured[layers].append(measure(recipe, root, layers, repeat))
            print(f"{name_of(layers)}, repeat {repeat}: {measured[layers][-1]}", flush=True)
    rows = [compare(layers, measured[layers], measured[None]) for layers in settings]
    return write_results(root, {"model": recipe.model, "rows": rows}, markdown(rows))


def make_inputs(recipe: TrunkSpeedRecipe, root: Path) -> None:
    """Write prompts of random words of the policy's vocabulary, which the run truncates to length."""
    tokenizer = load_tokenizer(recipe.model)
    rng = np.random.default_rng(recipe.seed)
    words = [token for token in tokenizer.get_vocab() if token[1:].isascii() and token[1:].isalpha()]
    texts = [" ".join(w[1:] for w in rng.choice(sorted(words), 2 * recipe.prompt_length)) for _ in range(64)]
    write_rows(root / "prompts.jsonl", [{"prompt": text, "completion": " an end."} for text in texts])
    (root / "benchmark_reward.py").write_text(REWARD)


def measure(recipe: TrunkSpeedRecipe, root: Path, layers: int | None, repeat: int) -> dict[str, float]:
    """Run launch/drpo.py once; return seconds of scoring and update per step, peak memory and sampled tokens."""
    name = f"{name_of(layers).replace(' ', '_')}_{repeat}"
    model: dict[str, Any] = {"path": recipe.model, "lora": {"r": recipe.lora_rank}}
    scripts = HERE.parent
    if layers is not None:
        model["trainable_layers"] = layers
    elif recipe.baseline is not None:
        scripts = Path(recipe.baseline).resolve() / "launch"
        if not (scripts / "drpo.py").is_file():
            raise ConfigError(f"baseline: {recipe.baseline!r} is no checkout, it has no launch/drpo.py")
    settings = {
        "seed": recipe.seed,
        "num_steps": recipe.num_steps,
        "data": {
            "task": "own",
            "path": str(root / "prompts.jsonl"),
            "eval_fraction": 0,
            "max_prompt_length": recipe.prompt_length,
            "truncation": "left",
        },
        "model": model,
        "reward": {"function": "benchmark_reward:score", "shaping": {"missing_stop": "none"}},
        "reset": {"proportion": 0},
        "rollout": {"batch_size": recipe.batch_size, "max_response_length": recipe.response_length},
        "ppo": {"num_epochs": recipe.num_epochs, "microbatch_size": recipe.microbatch_size},
        # A rate this small leaves the rollouts the same in every step and setting.
        "optim": {"learning_rate": 1e-9, "schedule": "constant"},
        "log": {"samples_every": 0},
        "engine": {"mixed_precision": "no", "trackers": []},
    }
    steps = measure_run(scripts / "drpo.py", settings, root / name, recipe.num_threads)
    timed = steps[1:]
    return {
        "seconds": sum(step.get(key, 0.0) for step in timed for key in COUNTED) / len(timed),
        "peak_gib": steps[-1]["perf/peak_memory_gib"],
        "tokens": steps[-1]["perf/sampled_tokens_per_second"] * steps[-1]["time/step"],
    }


def name_of(layers: int | None) -> str:
    """Return the name of a setting in the table."""
    return "all layers" if layers is None else f"top {layers}"


def compare(
    layers: int | None, rounds: list[dict[str, float]], baseline: list[dict[str, float]]
) -> dict[str, Any]:
    """Return the row of a setting: medians and ratios by round; raise ConfigError if the work differed."""
    tokens = {round(side["tokens"]) for side in (*rounds, *baseline)}
    if len(tokens) > 1:
        raise ConfigError(
            f"{name_of(layers)}: the rollouts have {sorted(tokens)} tokens, so the work was not the same"
        )
    return {
        "trained": name_of(layers),
        "seconds": float(np.median([side["seconds"] for side in rounds])),
        "faster": [base["seconds"] / side["seconds"] for base, side in zip(baseline, rounds, strict=True)],
        "peak_gib": float(np.median([side["peak_gib"] for side in rounds])),
        "memory": [side["peak_gib"] / base["peak_gib"] for base, side in zip(baseline, rounds, strict=True)],
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Format the table: medians over the rounds, and the ranges of the ratios."""
    return markdown_table(
        [
            {
                "trained": row["trained"],
                "score + update, s": f"{row['seconds']:.1f}",
                "times faster": median_and_range(row["faster"]),
                "peak GiB": f"{row['peak_gib']:.2f}",
                "share of the memory": median_and_range(row["memory"]),
            }
            for row in rows
        ]
    )


if __name__ == "__main__":
    main(TrunkSpeedRecipe, "smollm/trunk_speed.yaml", run)
