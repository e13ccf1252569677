"""Parts of the check on a GPU: what each runs, and the numbers that it finds."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from drpo.engine import Engine, EngineConfig
from drpo.models.loading import ModelConfig, load_policy
from drpo.models.tokenizer import load_tokenizer
from drpo.rollout.generator import Generator, vocabulary_of
from drpo.rollout.sampler import SamplingConfig
from drpo.run.metrics import read_metrics, reproducible
from drpo.versions import package_versions
from launch.command_line import StageFailed
from launch.demo_inputs import LAUNCH
from launch.experiments.flops import matmul_rate
from launch.experiments.measured_run import measure_run
from launch.experiments.speed import (
    LOSS_TOLERANCE,
    TRL,
    SpeedRecipe,
    flops_of,
    make_inputs,
    measure,
)
from launch.experiments.speed_cases import CASES, Case, our_settings
from launch.experiments.speed_table import loss_difference
from launch.experiments.speed_tools import Tools

EQUAL = 1e-3
"Largest difference, relative to values above 1, of metrics of float32 runs that do the same work in another order."
VLLM_DIFFERENCE = 0.05
"Mean |log-prob of vLLM - log-prob of the trainer| that rounding to bf16 explains; without an update it is larger."
NUM_BATCHES = 3
"Batches of rollouts of one size; the first is not counted."
SMALL = SpeedRecipe(cases=["ppo_tldr"], hidden_size=128, num_layers=2, num_heads=2, vocab_size=512, prompt_length=32,
                    response_length=32, batch_size=16, microbatch_size=4, num_epochs=2, num_steps=3)  # fmt: skip
"Models and steps of the checks."
UNEVEN = Case("drpo", "tldr", (), num_epochs=2)


class Skipped(Exception):
    """What is left of a part cannot run here; the message says why."""


@dataclass(frozen=True)
class Finding:
    """A number, and the largest absolute value with which the check passes; without one it is a measurement."""

    name: str
    value: float
    limit: float | None = None

    @property
    def is_right(self) -> bool:
        """Whether the value is within the limit; nan is not."""
        return self.limit is None or abs(self.value) <= self.limit


@dataclass(frozen=True)
class Setup:
    """Where the parts work, and the sizes of those that measure speed."""

    root: Path
    large: SpeedRecipe
    generation_batch_sizes: tuple[int, ...]
    lora_rank: int
    num_threads: int

    @property
    def rate(self) -> float:
        """Rate of matrix products in the precision of the large runs, in FLOP/s, measured now."""
        return matmul_rate({"no": torch.float32, "bf16": torch.bfloat16}[self.large.precision])


Part = Callable[[Setup], Iterator[Finding]]


# --- correctness ----------------------------------------------------------------------------------------


def small_inputs(setup: Setup) -> Iterator[Finding]:
    """Make the inputs of the checks, and the float32 run of one process that others must equal."""
    yield Finding("weights", make_inputs(SMALL, setup.root / "small"))
    small_run(setup, "small_inputs/alone")


def float32(setup: Setup) -> Iterator[Finding]:
    """A float32 run on the device equals the one on the CPU."""
    yield difference(alone(setup), small_run(setup, "float32/cpu", config="cpu"))


def bf16(setup: Setup) -> Iterator[Finding]:
    """The first ratio of a bf16 run is exactly 1."""
    yield from first_ratio(small_run(setup, "bf16/run", ONE_UPDATE, precision="bf16"))


def lora(setup: Setup) -> Iterator[Finding]:
    """Above a rounded base the first ratio is 1, and before the first update the policy is its reference."""
    rows = small_run(setup, "lora/run", ONE_UPDATE, {"model": {"lora": {"r": 8}}}, precision="bf16")
    yield from first_ratio(rows)
    yield Finding("KL before the first update", rows[0]["objective/kl_k3"], 0.0)


def fold_lora(setup: Setup) -> Iterator[Finding]:
    """In float32, rollouts of a folded adapter are those of the adapter."""
    adapter = {"model": {"lora": {"r": 8}}}
    apart = small_run(setup, "fold_lora/apart", adapter)
    yield difference(apart, small_run(setup, "fold_lora/folded", adapter, {"rollout": {"fold_lora": True}}))


def four_bit(setup: Setup) -> Iterator[Finding]:
    """The same two above a base in 4 bits: the reference's KL and the first ratio, and folded rollouts."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed (pip install -e '.[bnb]')")
    adapter = {"model": {"lora": {"r": 8}, "load_in_4bit": True}}
    rows = small_run(setup, "four_bit/run", ONE_UPDATE, adapter, precision="bf16")
    yield from first_ratio(rows)
    yield Finding("KL before the first update", rows[0]["objective/kl_k3"], 0.0)
    apart = small_run(setup, "four_bit/apart", adapter)
    yield difference(apart, small_run(setup, "four_bit/folded", adapter, {"rollout": {"fold_lora": True}}))


def offload(setup: Setup) -> Iterator[Finding]:
    """Models that wait on the host change no number."""
    changes = {"kl": {"offload_reference": True}, "reward": {"offload": True}}
    yield difference(alone(setup), small_run(setup, "offload/run", changes))


def sharded(config: str, setup: Setup) -> Iterator[Finding]:
    """A launcher that cuts state over processes gives the run of one process, and in bf16 a first ratio of 1."""
    yield difference(alone(setup), small_run(setup, f"{config}/float32", config=config))
    rows = small_run(setup, f"{config}/bf16", ONE_UPDATE, precision="bf16", config=config)
    yield from first_ratio(rows)


def vllm(setup: Setup) -> Iterator[Finding]:
    """After two updates vLLM's log-probs are those of the trainer."""
    if importlib.util.find_spec("vllm") is None:
        raise Skipped("vllm is not installed (docs/rollout_engines.md)")
    changes = {
        "rollout": {"engine": "vllm", "vllm": {"enforce_eager": True}},
        "optim": {"learning_rate": 1e-2},
    }
    last = small_run(setup, "vllm/run", changes, precision="bf16")[-1]
    yield Finding("log-probs differ by", last["rollout/logprob_difference"], VLLM_DIFFERENCE)
    yield Finding("KL from the first policy", last["objective/kl_k3"])


ONE_UPDATE = {"ppo": {"num_epochs": 1}}


def small_run(
    setup: Setup, name: str, *changes: Mapping[str, Any], precision: str = "no", config: str = "single_gpu"
) -> list[dict[str, float]]:
    """Run DR-PO with a small random model; return its metrics without times.

    Args:
        setup: of all parts.
        name: the run's folder.
        changes: settings on top, the later ones win.
        precision: no or bf16.
        config: name of the accelerate config; cpu: one process on the CPU.
    """
    inputs = setup.root / "small"
    settings = our_settings(UNEVEN, replace(SMALL, precision=precision).sizes_of(UNEVEN), inputs, "ours")
    base = {
        "model": {"path": str(inputs / "policy")},
        "reset": {"proportion": 0.5, "min_fraction": 0.0},
        "optim": {"learning_rate": 1e-3},
    }
    folder = setup.root / name
    folder.parent.mkdir(exist_ok=True)
    where = ["--cpu"]
    if config != "cpu":
        where = ["--config_file", str(LAUNCH / "accelerate" / f"{config}.yaml"), "--main_process_port", "0"]
    launcher = ["-m", "accelerate.commands.launch", *where, "--num_processes", "1"]
    launcher += ["--mixed_precision", precision]
    rows = measure_run(
        LAUNCH / "drpo.py", merged(settings, base, *changes), folder, setup.num_threads, launcher
    )
    return [reproducible(row) for row in rows]


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings, of which the later ones win."""
    return OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.create, layers)))


def alone(setup: Setup) -> list[dict[str, float]]:
    """Return the metrics of the run that others must equal."""
    path = setup.root / "small_inputs" / "alone" / "metrics.jsonl"
    if not path.exists():
        raise StageFailed(f"no {path} to compare with: the part small_inputs failed, or was left out")
    return [reproducible(row) for row in read_metrics(path)]


def difference(rows: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]]) -> Finding:
    """Return the largest difference of two metrics, relative to values above 1; raise StageFailed for other keys."""
    if [row.keys() for row in rows] != [row.keys() for row in others]:
        raise StageFailed("the runs have other metrics, or another number of steps")
    far = [
        abs(row[key] - other[key]) / max(1.0, abs(row[key]))
        for row, other in zip(rows, others, strict=True)
        for key in row
    ]
    return Finding("metrics differ by", float(torch.tensor(far, dtype=torch.float64).max()), EQUAL)


def first_ratio(rows: Sequence[Mapping[str, float]]) -> Iterator[Finding]:
    """Yield by how much the ratios differ from 1 in steps of one update."""
    distances = torch.tensor([abs(row["ppo/ratio"] - 1) for row in rows])
    yield Finding("ratio differs from 1 by", float(distances.max()), 1e-6)
    yield Finding("KL of the update", max(row["ppo/approx_kl"] for row in rows), 1e-10)


# --- speed ----------------------------------------------------------------------------------------------


def large_inputs(setup: Setup) -> Iterator[Finding]:
    """Make the inputs of the measurements."""
    yield Finding("million weights", make_inputs(setup.large, setup.root / "large") / 1e6)


def rollouts(setup: Setup) -> Iterator[Finding]:
    """Yield rollouts and tokens per second of the native engine, by the number of rows decoded together."""
    large, folder = setup.large, setup.root / "large" / "never_stops"
    tokenizer = load_tokenizer(str(folder))
    engine = Engine(EngineConfig(mixed_precision=large.precision, trackers=[]), setup.root, large.seed, None)
    policy = load_policy(ModelConfig(path=str(folder)), tokenizer, large.seed)
    policy = engine.place(policy, as_trained=True)
    vocabulary = vocabulary_of(tokenizer, policy.config.vocab_size)
    ids = torch.randint(large.vocab_size - 2, (max(setup.generation_batch_sizes), large.prompt_length))
    for size in setup.generation_batch_sizes:
        generator = Generator(
            policy, tokenizer, vocabulary, SamplingConfig(temperature=1.0), large.response_length, size
        )
        rates = []
        for batch in range(NUM_BATCHES):
            draws = [(batch, row) for row in range(size)]
            start = time.perf_counter()
            with generator.ready(engine), engine.autocast():
                new = generator.generate(ids[:size].tolist(), [large.response_length] * size, draws)
            rates.append(size / (time.perf_counter() - start))
        rate = sum(rates[1:]) / len(rates[1:])
        yield Finding(f"rollouts/s of {size}", rate)
        yield Finding(f"tokens/s of {size}", rate * sum(map(len, new.tokens)) / size)
    engine.close()


def ppo(setup: Setup) -> Iterator[Finding]:
    """Yield what a step of PPO with LoRA takes, and the update's share of the rate of matrix products."""
    large, case, inputs = setup.large, CASES["ppo"], setup.root / "large"
    settings = our_settings(case, large.sizes_of(case), inputs, "ours")
    changes = {"model": {"lora": {"r": setup.lora_rank}}}
    (setup.root / "ppo").mkdir(exist_ok=True)
    folder = setup.root / "ppo" / "run"
    steps = measure_run(LAUNCH / "drpo.py", merged(settings, changes), folder, setup.num_threads)
    shutil.rmtree(folder)  # gigabytes of weights and optimizer state
    counted = steps[large.warmup_steps :]
    seconds = {
        name: sum(step[f"time/{name}"] for step in counted) / len(counted)
        for name in ("step", "generate", "update")
    }
    yield from (Finding(f"{name}, s", value) for name, value in seconds.items())
    tokens = large.batch_size * (large.prompt_length + large.response_length) * large.num_epochs
    yield Finding("update tokens/s", tokens / seconds["update"])
    # Frozen matrices have no gradient: their backward is one product of the two.
    work = 2 / 3 * flops_of(large, case, inputs)["update"]
    yield Finding("update, share of the peak", work / seconds["update"] / setup.rate)
    yield Finding("peak GiB", max(step["perf/peak_memory_gib"] for step in steps))


def dpo(setup: Setup) -> Iterator[Finding]:
    """Yield what a step of DPO on all weights takes, and how many times as long TRL's takes."""
    large, case = setup.large, CASES["dpo"]
    tools = Tools(setup.root / "dpo", LAUNCH.parent, Path(sys.executable))
    tools.root.mkdir(exist_ok=True)
    (tools.root / "inputs").symlink_to(setup.root / "large")
    ours = measure(large, tools, "dpo", "ours", 0)
    shutil.rmtree(tools.root / "dpo_ours_0")
    seconds = ours.mean_seconds("step", large.warmup_steps)
    yield Finding("step, s", seconds)
    tokens = 2 * large.batch_size * (large.prompt_length + large.response_length)
    yield Finding("tokens/s", tokens / seconds)
    work = flops_of(large, case, setup.root / "large")["step"]
    yield Finding("share of the peak", work / seconds / setup.rate)
    yield Finding("peak GiB", ours.peak_memory_gib)
    version = package_versions(["trl"])["trl"]
    if not version.startswith(f"{TRL}."):
        raise Skipped(f"TRL {TRL} beside it: {version}")
    theirs = measure(large, tools, "dpo", "trl", 0)
    yield Finding("TRL's step, times as long", theirs.mean_seconds("step", large.warmup_steps) / seconds)
    yield Finding("TRL's peak GiB", theirs.peak_memory_gib)
    limit = LOSS_TOLERANCE[large.precision]
    yield Finding("losses differ by", loss_difference("dpo", "trl", [ours], [theirs], limit), limit)


CHECKS: dict[str, Part] = {
    "float32": float32,
    "bf16": bf16,
    "lora": lora,
    "fold_lora": fold_lora,
    "four_bit": four_bit,
    "offload": offload,
    **{config: functools.partial(sharded, config) for config in ("zero2", "zero3", "fsdp2")},
    "vllm": vllm,
}
SPEEDS: dict[str, Part] = {"rollouts": rollouts, "ppo": ppo, "dpo": dpo}
PARTS: dict[str, Part] = {
    "small_inputs": small_inputs,
    **CHECKS,
    "large_inputs": large_inputs,
    **SPEEDS,
}
