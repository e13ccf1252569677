"""Compare the speed of a DPO step with TRL's DPOTrainer: same weights, pairs, precision and threads.

    python launch/experiments/dpo_speed.py [recipe.yaml] [key=value ...]

Needs `pip install -e '.[bench]'`. Every measurement is a separate process, launch/dpo.py or
launch/experiments/dpo_speed_trl.py; the two sides alternate in going first, and each ratio is of two consecutive
measurements. The losses of all steps are compared too: if they differ, the work was not the same, and the experiment
raises an error.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parents[1])

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from drpo.config import ConfigError, Section, package_versions, refuse, setting
from drpo.data.order import item_at
from drpo.optim import OptimConfig
from drpo.precision import multiplies_bf16
from launch.command_line import call, main
from launch.experiments.measured_run import measure_run, write_rows
from launch.experiments.results import markdown_table, median_and_range, write_results

TRL = "1.16"
Precision = Literal["no", "bf16"]
LOSS_TOLERANCE = {"no": 1e-3, "bf16": 5e-2}  # nats, on losses around log 2
BETA = 0.1
LEARNING_RATE = 1e-4


def _fast_bf16() -> bool:
    return multiplies_bf16("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class BenchmarkRecipe(Section):
    """Settings of one comparison: a model, the shape of the data, and the number of repeats."""

    run_dir: str = "runs/benchmark"
    """Folder of the inputs, of every measurement, and of results.json and results.md."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """model_type and further keys of a transformers config; the weights are random."""
    attn_implementation: str = "sdpa"
    """Attention of both sides: sdpa, eager, ..."""
    precisions: list[Precision] = field(default_factory=lambda: ["no", "bf16"] if _fast_bf16() else ["no"])
    """no: float32; bf16: float32 weights under autocast. By default bf16 only where it is fast."""
    cached_reference: bool = False
    """Compare steps that read the reference's log-probs, computed before training, in place of live ones."""
    share_prompts: bool = True
    """Ours computes each prompt once; false: as separate rows, to see what sharing brings."""
    prompt_lengths: list[int] = field(default_factory=lambda: [256, 300])
    """Shortest and longest prompt in tokens; in between all are equally likely."""
    response_length: float = setting(34.0, ge=4)
    """Mean tokens of a response, stop token included, normal with a quarter of it as standard deviation."""
    batch_size: int = setting(16, ge=1)
    """Pairs per optimizer step."""
    microbatch_size: int = setting(8, ge=1)
    """Pairs per forward."""
    num_steps: int = 6
    """Optimizer steps of a measurement."""
    warmup_steps: int = setting(2, ge=1)
    """How many of them are not timed."""
    num_repeats: int = setting(5, ge=1)
    """Pairs of measurements for each precision."""
    num_threads: int = setting(2, ge=1)
    """OMP_NUM_THREADS of every process."""
    seed: int = 0
    """Seed of weights and data."""

    def check(self) -> None:
        is_wrong = len(self.prompt_lengths) != 2 or not 1 <= self.prompt_lengths[0] <= self.prompt_lengths[1]
        refuse(is_wrong, "prompt_lengths", f"must be two rising numbers >= 1, got {self.prompt_lengths}")
        rule = f"({self.batch_size}) must be a multiple of microbatch_size ({self.microbatch_size})"
        refuse(self.batch_size % self.microbatch_size != 0, "batch_size", rule)
        rule = f"({self.warmup_steps}) must be below num_steps ({self.num_steps})"
        refuse(self.warmup_steps >= self.num_steps, "warmup_steps", rule)


@dataclass(frozen=True)
class Measurement:
    """Result of one process of one side."""

    seconds: list[float]
    losses: list[float]
    peak_memory_gib: float

    def pairs_per_second(self, recipe: BenchmarkRecipe) -> float:
        timed = self.seconds[recipe.warmup_steps :]
        return recipe.batch_size * len(timed) / sum(timed)


def run(recipe: BenchmarkRecipe) -> Path:
    """Measure, compare, and write the table."""
    if "model_type" not in recipe.architecture:
        raise ConfigError("no model: give architecture.model_type, for example gpt_neox")
    version = package_versions(["trl"])["trl"]
    if not version.startswith(f"{TRL}."):
        raise ConfigError(f"expected TRL {TRL}, got: {version}; to fix: pip install -e '.[bench]'")
    root = Path(recipe.run_dir).resolve()
    num_parameters = make_inputs(recipe, root / "inputs")
    rows = []
    for precision in recipe.precisions:
        pairs: list[tuple[Measurement, Measurement]] = []
        for repeat in range(recipe.num_repeats):
            sides = [measure_ours, measure_trl]
            measured = {
                side: side(recipe, root, precision, repeat)
                for side in (sides if repeat % 2 == 0 else sides[::-1])
            }
            pairs.append((measured[measure_ours], measured[measure_trl]))
            ours, trl = (side.pairs_per_second(recipe) for side in pairs[-1])
            print(f"{precision}, repeat {repeat}: ours {ours:.2f}, TRL {trl:.2f} pairs/s", flush=True)
        rows.append(compare(recipe, precision, pairs))
    print(f"TRL {version}, {num_parameters / 1e6:.1f}M parameters\n")
    result = {"trl": version, "torch": torch.__version__, "num_parameters": num_parameters, "rows": rows}
    return write_results(root, result, markdown(rows))


def make_inputs(recipe: BenchmarkRecipe, folder: Path) -> int:
    """Write random weights, a tokenizer of words, and the pairs. Returns the number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    num_pairs = recipe.num_steps * recipe.batch_size
    config = AutoConfig.for_model(**recipe.architecture)
    torch.manual_seed(recipe.seed)
    policy = AutoModelForCausalLM.from_config(config)
    policy.save_pretrained(folder / "policy")
    words = {f"w{i}": i for i in range(config.vocab_size - 2)}
    words |= {"<stop>": len(words), "<pad>": len(words) + 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<stop>", pad_token="<pad>"
    ).save_pretrained(folder / "policy")
    rng = np.random.default_rng(recipe.seed)

    def text(length: int) -> str:
        return "".join(f" w{i}" for i in rng.integers(0, len(words) - 2, length))

    def response() -> str:
        spread = recipe.response_length / 4
        length = rng.normal(recipe.response_length, spread)
        return text(round(float(np.clip(length, spread, 2 * recipe.response_length))) - 1)

    shortest, longest = recipe.prompt_lengths
    pairs = [
        {
            "prompt": text(int(rng.integers(shortest, longest + 1)))[1:],
            "chosen": response(),
            "rejected": response(),
        }
        for _ in range(num_pairs + 1)
    ]
    write_rows(folder / "pairs" / "train.jsonl", pairs[1:])
    write_rows(folder / "pairs" / "held_out.jsonl", pairs[:1])
    # Our steps draw the pairs in a seeded order; TRL gets them in that order.
    in_order = [item_at(pairs[1:], index, recipe.seed) for index in range(num_pairs)]
    write_rows(folder / "pairs_in_order.jsonl", in_order)
    return sum(p.numel() for p in policy.parameters())


def measure_ours(recipe: BenchmarkRecipe, root: Path, precision: str, repeat: int) -> Measurement:
    """Measure one run of launch/dpo.py."""
    folder = root / f"ours_{precision}_{repeat}"
    settings = {
        "seed": recipe.seed,
        "num_steps": recipe.num_steps,
        "data": {"task": "own", "path": str(root / "inputs" / "pairs"), "eval_split": "held_out"},
        "model": {"path": str(root / "inputs" / "policy"), "attn_implementation": recipe.attn_implementation},
        "loss": {"name": "dpo", "beta": BETA},
        "share_prompts": recipe.share_prompts,
        "batch": {"size": recipe.batch_size, "microbatch_size": recipe.microbatch_size},
        "optim": {"learning_rate": LEARNING_RATE, "schedule": "constant"},
        "sample": {"num_prompts": 0},
        "engine": {"mixed_precision": precision, "trackers": []},
    }
    if recipe.cached_reference:
        settings["reference"] = {"cache_dir": str(root / f"reference_{precision}")}
    steps = measure_run(HERE.parent / "dpo.py", settings, folder, recipe.num_threads)
    return Measurement(
        [step["time/step"] for step in steps],
        [step["train/loss"] for step in steps],
        steps[-1]["perf/peak_memory_gib"],
    )


def measure_trl(recipe: BenchmarkRecipe, root: Path, precision: str, repeat: int) -> Measurement:
    """Measure one run of launch/experiments/dpo_speed_trl.py."""
    folder = root / f"trl_{precision}_{repeat}"
    optim = OptimConfig()
    job = {
        "policy": str(root / "inputs" / "policy"),
        "pairs": str(root / "inputs" / "pairs_in_order.jsonl"),
        "result": f"{folder}_result.json",
        "attn_implementation": recipe.attn_implementation,
        "arguments": {
            "output_dir": str(folder),
            "beta": BETA,
            "per_device_train_batch_size": recipe.microbatch_size,
            "gradient_accumulation_steps": recipe.batch_size // recipe.microbatch_size,
            "max_steps": recipe.num_steps,
            "learning_rate": LEARNING_RATE,
            "adam_beta2": optim.betas[1],
            "adam_epsilon": optim.eps,
            "max_grad_norm": optim.max_grad_norm,
            "precompute_ref_log_probs": recipe.cached_reference,
            "bf16": precision == "bf16",
        },
    }
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(job, indent=1))
    call(recipe.num_threads, [str(HERE / "dpo_speed_trl.py"), str(path)], folder.with_suffix(".log"))
    return Measurement(**json.loads(Path(job["result"]).read_text()))


def compare(
    recipe: BenchmarkRecipe, precision: str, pairs: list[tuple[Measurement, Measurement]]
) -> dict[str, Any]:
    """Return the row of a precision; raise ConfigError when the two sides did not compute the same losses."""
    difference = max(abs(a - b) for ours, trl in pairs for a, b in zip(ours.losses, trl.losses, strict=True))
    if difference > LOSS_TOLERANCE[precision]:
        raise ConfigError(
            f"precision {precision}: the losses differ by up to {difference:.2g}, so the two sides did not do the "
            f"same work: ours {pairs[0][0].losses}, TRL {pairs[0][1].losses}"
        )
    rates = np.array([[side.pairs_per_second(recipe) for side in pair] for pair in pairs])
    return {
        "precision": precision,
        "ours": rates[:, 0].tolist(),
        "trl": rates[:, 1].tolist(),
        "ratio": (rates[:, 0] / rates[:, 1]).tolist(),
        "ours_peak_gib": float(np.median([ours.peak_memory_gib for ours, _ in pairs])),
        "trl_peak_gib": float(np.median([trl.peak_memory_gib for _, trl in pairs])),
        "loss_difference": difference,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Format the table: medians over the repeats, and the range of the ratios."""
    return markdown_table(
        [
            {
                "precision": "float32" if row["precision"] == "no" else row["precision"],
                "ours, pairs/s": f"{np.median(row['ours']):.2f}",
                "TRL, pairs/s": f"{np.median(row['trl']):.2f}",
                "ratio: median (range)": median_and_range(row["ratio"]),
                "peak GiB ours / TRL": f"{row['ours_peak_gib']:.2f} / {row['trl_peak_gib']:.2f}",
                "losses differ by": f"{row['loss_difference']:.1e}",
            }
            for row in rows
        ]
    )


if __name__ == "__main__":
    main(BenchmarkRecipe, "demo/benchmark.yaml", run)
