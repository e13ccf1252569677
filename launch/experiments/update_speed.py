"""Measure scoring and update of an online step: rows of one length, of uneven lengths, several rollouts to a prompt.

    python launch/experiments/update_speed.py [recipe.yaml] [key=value ...]

Every measurement is a separate process, launch/drpo.py on the same prompts, weights and random numbers. The two sides
of a case alternate: the options that are older, or another checkout of the project (`baseline`), and those of today.
Compared are the time of scoring and update together, the peak memory of the process, and the value loss, which must
be the same.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parents[1])

import numpy as np

from drpo.config import ConfigError, Section, refuse, setting
from drpo.models.loading import ModelConfig, load_policy
from drpo.models.tokenizer import train_tokenizer
from launch.command_line import main
from launch.experiments.measured_run import measure_run, write_rows
from launch.experiments.results import markdown_table, median_and_range, write_results

CASES = ("even", "uneven", "shared")
COUNTED = ("time/score", "time/update")
REWARD = "def score(completions):\n    return [float(len(c.response_ids)) for c in completions]\n"
NUM_PROMPTS = 256
SPREAD = 0.8
"Standard deviation of the logarithm of uneven prompt lengths."


@dataclass(frozen=True)
class UpdateSpeedRecipe(Section):
    """Settings of one comparison: the model, the shape of a step, and the number of rounds."""

    run_dir: str = "runs/update_speed"
    """Folder of the inputs, of every measurement, and of results.json and results.md."""
    baseline: str | None = None
    """Another checkout of the project for the older side; null: this one, with the older options."""
    cases: list[str] = field(default_factory=lambda: list(CASES))
    """even: prompts of one length. uneven: log-normal ones. shared: several rollouts to a prompt of one length."""
    hidden_size: int = setting(256, ge=8)
    """Width of the random GPT-NeoX policy."""
    num_layers: int = setting(6, ge=1)
    """Its layers."""
    prompt_length: int = setting(256, ge=2)
    """Tokens of a prompt; the median of uneven ones, whose longest has four times as many."""
    response_length: int = setting(53, ge=2)
    """Most tokens of a response."""
    batch_size: int = setting(32, ge=4)
    """Rollouts of a step."""
    rollouts_per_prompt: int = setting(4, ge=2)
    """Rollouts to a prompt in the case shared."""
    microbatch_size: int = setting(8, ge=1)
    """Rows per forward; where lengths are uneven, today's side takes as many tokens as rows of median length have."""
    num_epochs: int = setting(2, ge=1)
    """Passes over the rollouts."""
    num_steps: int = setting(2, ge=2)
    """Steps of a measurement; the first is not counted."""
    num_repeats: int = setting(3, ge=1)
    """Rounds of measurements."""
    num_threads: int = setting(2, ge=1)
    """OMP_NUM_THREADS of every process."""
    seed: int = setting(0, ge=0)
    """Seed of prompts, weights and rollouts."""

    def check(self) -> None:
        refuse(
            not self.cases or not set(self.cases) <= set(CASES),
            "cases",
            f"must be some of {', '.join(CASES)}",
        )
        rule = f"({self.batch_size}) must be a multiple of rollouts_per_prompt ({self.rollouts_per_prompt})"
        refuse(self.batch_size % self.rollouts_per_prompt != 0, "batch_size", rule)


def run(recipe: UpdateSpeedRecipe) -> Path:
    """Measure, compare, and write the table."""
    root = Path(recipe.run_dir).resolve()
    make_inputs(recipe, root)
    rows = []
    for case in recipe.cases:
        rounds: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
        for repeat in range(recipe.num_repeats):
            for side in ("before", "now") if repeat % 2 == 0 else ("now", "before"):
                rounds[side].append(measure(recipe, root, case, side, repeat))
                print(f"{case}, {side}, repeat {repeat}: {rounds[side][-1]}", flush=True)
        rows.append(compare(case, rounds["before"], rounds["now"]))
    return write_results(root, {"rows": rows}, markdown(rows))


def make_inputs(recipe: UpdateSpeedRecipe, root: Path, vocab_size: int = 2048, num_words: int = 200) -> None:
    """Write the policy, and prompts of random words of one token or a few."""
    rng = np.random.default_rng(recipe.seed)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    words = ["".join(word) for word in rng.choice(letters, (num_words, 6))]
    tokenizer = train_tokenizer([" " + " ".join(rng.choice(words, 50)) for _ in range(400)], vocab_size)
    longest = 4 * recipe.prompt_length
    architecture = {
        "model_type": "gpt_neox",
        "hidden_size": recipe.hidden_size,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": max(1, recipe.hidden_size // 32),
        "intermediate_size": 4 * recipe.hidden_size,
        "max_position_embeddings": longest + recipe.response_length,
    }
    config = ModelConfig(architecture=architecture, vocab_size=vocab_size)
    load_policy(config, tokenizer, recipe.seed).save_pretrained(root / "policy")
    tokenizer.save_pretrained(root / "policy")
    even = np.full(NUM_PROMPTS, recipe.prompt_length)
    uneven = (
        np.exp(rng.normal(np.log(recipe.prompt_length), SPREAD, NUM_PROMPTS)).astype(int).clip(2, longest)
    )
    for name, lengths in (("even", even), ("uneven", uneven)):
        # More words than tokens are wanted: the run truncates each prompt to its own length.
        rows = [
            {"prompt": " " + " ".join(rng.choice(words, length)), "completion": " end"} for length in lengths
        ]
        write_rows(root / f"{name}.jsonl", rows)
    (root / "benchmark_reward.py").write_text(REWARD)


def measure(recipe: UpdateSpeedRecipe, root: Path, case: str, side: str, repeat: int) -> dict[str, float]:
    """Run launch/drpo.py once; return seconds of scoring and update per step, peak memory and the value loss.

    Args:
        recipe: sizes of the step.
        root: folder of the inputs.
        case: one of CASES.
        side: before or now.
        repeat: number of the round.
    """
    scripts = HERE.parent
    ppo: dict[str, Any] = {"num_epochs": recipe.num_epochs, "microbatch_size": recipe.microbatch_size}
    if side == "before" and recipe.baseline is not None:
        scripts = Path(recipe.baseline).resolve() / "launch"
        if not (scripts / "drpo.py").is_file():
            raise ConfigError(f"baseline: {recipe.baseline!r} is no checkout, it has no launch/drpo.py")
    elif side == "before":
        ppo["share_prompts"] = False
    elif case == "uneven":
        ppo["microbatch_tokens"] = recipe.microbatch_size * (recipe.prompt_length + recipe.response_length)
    settings = {
        "seed": recipe.seed,
        "num_steps": recipe.num_steps,
        "data": {
            "task": "own",
            "path": str(root / ("uneven.jsonl" if case == "uneven" else "even.jsonl")),
            "eval_fraction": 0,
            "max_prompt_length": recipe.prompt_length * (4 if case == "uneven" else 1),
            "truncation": "left",
        },
        "model": {"path": str(root / "policy")},
        "reward": {"function": "benchmark_reward:score", "shaping": {"missing_stop": "none"}},
        "reset": {"proportion": 0},
        "rollout": {
            "batch_size": recipe.batch_size,
            "rollouts_per_prompt": recipe.rollouts_per_prompt if case == "shared" else 1,
            "max_response_length": recipe.response_length,
        },
        "ppo": ppo,
        # A rate this small leaves the rollouts the same in every step and on both sides.
        "optim": {"learning_rate": 1e-9, "schedule": "constant"},
        "log": {"samples_every": 0},
        "engine": {"mixed_precision": "no", "trackers": []},
    }
    name = f"{case}_{side}_{repeat}"
    steps = measure_run(scripts / "drpo.py", settings, root / name, recipe.num_threads)
    timed = steps[1:]
    return {
        "seconds": sum(step[key] for step in timed for key in COUNTED) / len(timed),
        "peak_gib": steps[-1]["perf/peak_memory_gib"],
        "value_loss": steps[-1]["ppo/value_loss"],
    }


def compare(case: str, before: list[dict[str, float]], now: list[dict[str, float]]) -> dict[str, Any]:
    """Return the row of a case: medians and ratios by round; raise ConfigError if the losses differ."""
    losses = [side["value_loss"] for side in (*before, *now)]
    if max(losses) - min(losses) > 1e-3 * abs(max(losses)):
        raise ConfigError(f"{case}: the value losses are {sorted(losses)}, so the work was not the same")
    pairs = list(zip(before, now, strict=True))
    return {
        "case": case,
        "before": float(np.median([side["seconds"] for side in before])),
        "now": float(np.median([side["seconds"] for side in now])),
        "faster": [old["seconds"] / new["seconds"] for old, new in pairs],
        "memory": [new["peak_gib"] / old["peak_gib"] for old, new in pairs],
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Format the table: medians over the rounds, and the ranges of the ratios."""
    return markdown_table(
        [
            {
                "rows": row["case"],
                "before, s": f"{row['before']:.2f}",
                "now, s": f"{row['now']:.2f}",
                "times faster": median_and_range(row["faster"]),
                "share of the memory": median_and_range(row["memory"]),
            }
            for row in rows
        ]
    )


if __name__ == "__main__":
    main(UpdateSpeedRecipe, "demo/update_speed.yaml", run)
