"""Measure the speed of training beside TRL and beside an earlier commit: the table of docs/performance.md.

    python launch/experiments/speed.py [recipe.yaml] [key=value ...]

Needs `pip install -e '.[bench]'` (TRL 1.16) for DPO, SFT and reward models; TRL 1.12, the last with PPO, is installed
into an environment in the run folder. Every measurement is a separate process; the sides of a case take turns at going
first, and each ratio is of measurements of one round. Where both sides do the same work their losses must be equal,
else there is no result. Each time stands beside its share of the rate at which this machine multiplies matrices.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parents[1])

from drpo.config import ConfigError, Section, refuse, setting
from drpo.jsonl import read_objects
from drpo.optim import OptimConfig
from drpo.versions import package_versions
from launch.command_line import call, main
from launch.environment import environment_text
from launch.experiments.flops import Shape
from launch.experiments.measured_run import measure_run
from launch.experiments.results import write_results
from launch.experiments.speed_cases import (
    BETA,
    CASES,
    LEARNING_RATE,
    NUM_RANKED,
    ONLINE_LEARNING_RATE,
    Case,
    Sizes,
    data_of,
    our_settings,
    policy_of,
    work,
)
from launch.experiments.speed_inputs import LENGTHS, longest, make_models, make_texts
from launch.experiments.speed_table import Measurement, Scale, compare, markdown
from launch.experiments.speed_tools import Tools, checkout, environment_with_trl

TRL, TRL_WITH_PPO = "1.16", "1.12"
LOSS_TOLERANCE = {"no": 1e-3, "bf16": 5e-2}  # relative to the loss, or absolute below 1


@dataclass(frozen=True)
class SpeedRecipe(Section):
    """Settings of a comparison: the cases, the model, the shape of a step, and the number of rounds."""

    run_dir: str = "runs/speed"
    """Folder of the inputs, of every measurement, and of results.json and results.md."""
    cases: list[str] = field(default_factory=lambda: list(CASES))
    """Which cases (launch/experiments/speed_cases.py) are measured."""
    baseline: str | None = "cbd9fac"
    """Earlier commit of the project, or a checkout of one; null leaves the measurements beside it out."""
    hidden_size: int = setting(256, ge=8)
    """Width of the random GPT-NeoX models."""
    num_layers: int = setting(6, ge=1)
    """Their layers."""
    num_heads: int = setting(4, ge=1)
    """Their attention heads."""
    vocab_size: int = setting(8192, ge=100)
    """Their vocabulary."""
    prompt_length: int = setting(256, ge=2)
    """Tokens of an even prompt; the median of uneven ones."""
    response_length: int = setting(53, ge=2)
    """Tokens of an even response; the unit of uneven ones."""
    batch_size: int = setting(16, ge=1)
    """Rollouts, pairs or demonstrations of a step; four times as many in the case resets."""
    microbatch_size: int = setting(8, ge=1)
    """Rows or pairs per forward; where lengths are uneven, our side takes as many tokens as median rows have."""
    num_epochs: int = setting(4, ge=1)
    """Passes over the rollouts; one where lengths are uneven."""
    num_steps: int = setting(3, ge=2)
    """Steps of a measurement."""
    warmup_steps: int = setting(1, ge=1)
    """How many of them are not counted."""
    num_repeats: int = setting(3, ge=1)
    """Rounds of measurements."""
    num_threads: int = setting(2, ge=1)
    """OMP_NUM_THREADS of every process."""
    precision: Literal["no", "bf16"] = "no"
    """no: float32; bf16: float32 weights under autocast."""
    seed: int = setting(0, ge=0)
    """Seed of weights, texts and rollouts."""

    def check(self) -> None:
        unknown = not self.cases or not set(self.cases) <= set(CASES)
        refuse(unknown, "cases", f"must be some of {', '.join(CASES)}")
        rule = f"({self.batch_size}) must be a multiple of microbatch_size ({self.microbatch_size})"
        refuse(self.batch_size % self.microbatch_size != 0, "batch_size", rule)
        for name in self.cases:
            together = CASES[name].rollouts_per_prompt
            rule = f"({self.batch_size}) must be a multiple of {together} for the case {name}"
            refuse(self.batch_size % together != 0, "batch_size", rule)
        rule = f"({self.warmup_steps}) must be below num_steps ({self.num_steps})"
        refuse(self.warmup_steps >= self.num_steps, "warmup_steps", rule)

    @property
    def shape(self) -> Shape:
        """Sizes of every model."""
        return Shape(self.hidden_size, self.num_layers, 4 * self.hidden_size, self.vocab_size)

    def sides_of(self, case: Case) -> tuple[str, ...]:
        """Return what a case is measured beside."""
        return tuple(side for side in case.beside if side != "before" or self.baseline is not None)

    def sizes_of(self, case: Case) -> Sizes:
        """Return the sizes of a case's step."""
        prompts, responses = LENGTHS[case.lengths]
        median = round(prompts.median * self.prompt_length + responses.median * self.response_length)
        longest_response = longest(case.lengths, self.prompt_length, self.response_length)[1]
        return Sizes(self.batch_size, self.microbatch_size, median, longest_response, self.num_steps,
                     case.num_epochs or self.num_epochs, self.precision, self.seed)  # fmt: skip


def run(recipe: SpeedRecipe) -> Path:
    """Measure, compare, and write the table."""
    root = Path(recipe.run_dir).resolve()
    cases = {name: CASES[name] for name in recipe.cases if recipe.sides_of(CASES[name])}
    if not cases:
        raise ConfigError("baseline is null, and the cases are measured beside it alone: nothing to measure")
    tools = prepare(recipe, list(cases.values()), root)
    num_weights = make_inputs(recipe, root / "inputs")
    peaks, measured = [peak_flops(recipe, root)], {}
    for name, case in cases.items():
        rounds: dict[str, list[Measurement]] = {side: [] for side in ("ours", *recipe.sides_of(case))}
        for repeat in range(recipe.num_repeats):
            for side in list(rounds) if repeat % 2 == 0 else list(rounds)[::-1]:
                rounds[side].append(measure(recipe, tools, name, side, repeat))
                step = rounds[side][-1].mean_seconds("step", recipe.warmup_steps)
                print(f"{name}, {side}, round {repeat}: {step:.2f} s a step", flush=True)
        peaks.append(peak_flops(recipe, root))
        measured[name] = rounds
    scale = Scale(recipe.warmup_steps, max(peaks), LOSS_TOLERANCE[recipe.precision])
    rows = [
        row
        for name, rounds in measured.items()
        for row in compare(name, cases[name], rounds, flops_of(recipe, cases[name], root / "inputs"), scale)
    ]
    result = {
        "recipe": asdict(recipe),
        "environment": environment_text().splitlines(),
        "trl_with_ppo": TRL_WITH_PPO,
        "num_weights": num_weights,
        "matmul_flops": peaks,
        "rows": rows,
    }
    text = (
        f"{num_weights / 1e6:.1f}M weights, {recipe.num_repeats} rounds; products of large matrices reached "
        f"{max(peaks) / 1e9:.0f} GFLOP/s at most, {min(peaks) / 1e9:.0f} in the slowest of {len(peaks)} samples\n\n"
    )
    return write_results(root, result, text + markdown(rows))


def prepare(recipe: SpeedRecipe, cases: Sequence[Case], root: Path) -> Tools:
    """Check TRL, and get the earlier commit and TRL with PPO where a case needs them."""
    root.mkdir(parents=True, exist_ok=True)
    beside = {(case.is_online, side) for case in cases for side in recipe.sides_of(case)}
    version = package_versions(["trl"])["trl"]
    if (False, "trl") in beside and not version.startswith(f"{TRL}."):
        raise ConfigError(f"expected TRL {TRL}, got: {version}; to fix: pip install -e '.[bench]'")
    before, python = HERE.parents[1], Path(sys.executable)
    if recipe.baseline is not None and any(side == "before" for _, side in beside):
        before = checkout(recipe.baseline, root / "before")
    if (True, "trl") in beside:
        python = environment_with_trl(TRL_WITH_PPO, "from trl.experimental.ppo import PPOTrainer", root)
    return Tools(root, before, python)


def make_inputs(recipe: SpeedRecipe, folder: Path) -> int:
    """Write models and texts; return the number of weights of a policy."""
    positions = max(sum(longest(name, recipe.prompt_length, recipe.response_length)) for name in LENGTHS)
    num_rows = recipe.num_steps * recipe.batch_size * max(CASES[name].num_batches for name in recipe.cases)
    make_texts(folder, recipe.vocab_size, recipe.prompt_length, recipe.response_length, num_rows, recipe.seed)
    return make_models(folder, recipe.shape, recipe.num_heads, positions, recipe.seed)


def peak_flops(recipe: SpeedRecipe, root: Path) -> float:
    """Return the highest rate of matrix products that a process of the benchmark's kind reaches now, in FLOP/s."""
    dtype = {"no": "float32", "bf16": "bfloat16"}[recipe.precision]
    call(recipe.num_threads, [str(HERE / "flops.py"), str(root / "peak.json"), dtype], root / "peak.log")
    return json.loads((root / "peak.json").read_text())


def measure(recipe: SpeedRecipe, tools: Tools, name: str, side: str, repeat: int) -> Measurement:
    """Run one side of a case in a process of its own.

    Args:
        recipe: sizes of the step.
        tools: of the other sides.
        name: of the case.
        side: ours, trl, before, prompts or pairs.
        repeat: number of the round.
    """
    case, folder = CASES[name], tools.root / f"{name}_{side}_{repeat}"
    if side == "trl":
        return measure_trl(recipe, tools, case, folder)
    scripts = tools.before / "launch" if side == "before" else HERE.parent
    settings = our_settings(case, recipe.sizes_of(case), tools.root / "inputs", side)
    steps = measure_run(scripts / f"{case.stage}.py", settings, folder, recipe.num_threads)
    seconds = {"step": [step["time/step"] for step in steps]}
    if case.is_online:
        seconds["generate"] = [step["time/generate"] for step in steps]
        seconds["update"] = [step["time/update"] for step in steps]
        pairs = zip(seconds["step"], seconds["generate"], strict=True)
        seconds["learn"] = [step - sampling for step, sampling in pairs]
    loss = "ppo/value_loss" if case.is_online else "train/loss"
    return Measurement(seconds, [step[loss] for step in steps], steps[-1]["perf/peak_memory_gib"])


def measure_trl(recipe: SpeedRecipe, tools: Tools, case: Case, folder: Path) -> Measurement:
    """Run launch/experiments/speed_trl.py, with the Python that has the trainer of the case."""
    inputs, optim = tools.root / "inputs", OptimConfig()
    batch_size = recipe.batch_size * case.num_batches
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": recipe.microbatch_size,
        "gradient_accumulation_steps": batch_size // recipe.microbatch_size,
        "learning_rate": ONLINE_LEARNING_RATE if case.is_online else LEARNING_RATE,
        "adam_beta2": optim.betas[1],
        "adam_epsilon": optim.eps,
        "max_grad_norm": optim.max_grad_norm,
        "bf16": recipe.precision == "bf16",
        "seed": recipe.seed,
    }
    if case.is_online:
        arguments |= {
            "total_episodes": recipe.num_steps * batch_size,
            "num_ppo_epochs": case.num_epochs or recipe.num_epochs,
            "response_length": recipe.response_length,
            "temperature": 1.0,
        }
    else:
        arguments["max_steps"] = recipe.num_steps
    if case.stage == "dpo":
        arguments["beta"] = BETA
    job = {
        "stage": case.stage,
        "policy": str(inputs / policy_of(case)),
        "reward_model": str(inputs / "reward_model"),
        "rows": str(inputs / data_of(case).replace(".jsonl", "_in_order.jsonl")),
        "result": f"{folder}_result.json",
        "arguments": arguments,
    }
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(job, indent=1))
    python = tools.python_with_ppo if case.is_online else sys.executable
    command = [str(HERE / "speed_trl.py"), str(path)]
    call(recipe.num_threads, command, folder.with_suffix(".log"), python=python)
    return Measurement(**json.loads(Path(job["result"]).read_text()))


def flops_of(recipe: SpeedRecipe, case: Case, inputs: Path) -> dict[str, float]:
    """Return the operations of each part of a case's step, mean over the steps that count; sampling is not counted."""
    num_prompts = recipe.batch_size * case.num_batches // case.rollouts_per_prompt
    if case.ranked:
        num_prompts //= NUM_RANKED
    rows = read_objects(inputs / data_of(case).replace(".jsonl", "_in_order.jsonl"))
    rows = rows[recipe.warmup_steps * num_prompts : recipe.num_steps * num_prompts]
    lengths = [
        (len(row["prompt"].split()), len(response.split()) + 1)
        for row in rows
        for response in _responses_of(row)
    ] * case.rollouts_per_prompt
    epochs = case.num_epochs or recipe.num_epochs
    counted = recipe.num_steps - recipe.warmup_steps
    parts = [part for part in case.parts if part != "generate"]
    return {part: work(case, part, lengths, recipe.shape, epochs) / counted for part in parts}


def _responses_of(row: dict[str, Any]) -> list[str]:
    """Return the responses of a row, in ranked data those of every pair."""
    if "responses" in row:
        return [response for pair in combinations(row["responses"], 2) for response in pair]
    return [row[key] for key in ("completion", "chosen", "rejected") if key in row]


if __name__ == "__main__":
    main(SpeedRecipe, "demo/benchmark.yaml", run)
