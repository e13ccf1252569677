"""Measure rollouts of an untrained policy: the native engine beside vLLM, with the time that its weights take.

    python launch/experiments/rollout_speed.py [recipe.yaml] [key=value ...]

For a Python that has vLLM (docs/rollout_engines.md). Every measurement is a separate process with the same prompts and
weights; the engines alternate. Compared are the sampled tokens per second of generation, which for vLLM
includes handing over the weights, and reported is how far its log-probs are from the trainer's.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parents[1])

import numpy as np
import torch
import yaml

from drpo.config import Section, setting
from drpo.engine import Engine, EngineConfig
from drpo.models.loading import ModelConfig, load_policy
from drpo.models.scoring import response_logprobs
from drpo.models.tokenizer import load_tokenizer
from drpo.rollout.generator import Generator, vocabulary_of
from drpo.rollout.sampler import SamplingConfig
from drpo.rollout.vllm_engine import VLLMEngine
from drpo.rollout.vllm_requests import VLLMConfig, check_installed
from drpo.tensors import pad_batch
from launch.command_line import call, main
from launch.experiments.flops import Shape
from launch.experiments.results import markdown_table, median_and_range, write_results
from launch.experiments.speed_inputs import longest, make_models, make_texts

ENGINES = ("native", "vllm")


@dataclass(frozen=True)
class RolloutSpeedRecipe(Section):
    """Settings of the comparison: the model, the shape of the rollouts, and the number of rounds."""

    run_dir: str = "runs/rollout_speed"
    """Folder of the inputs, of every measurement, and of results.json and results.md."""
    hidden_size: int = setting(256, ge=8)
    """Width of the random GPT-NeoX policy; a head has 32 numbers."""
    num_layers: int = setting(6, ge=1)
    """Its layers."""
    vocab_size: int = setting(8192, ge=300)
    """Its ids."""
    prompt_length: int = setting(256, ge=2)
    """Tokens of an even prompt; the median of uneven ones."""
    response_length: int = setting(53, ge=2)
    """Most tokens of a response, whatever the lengths of prompts."""
    lengths: Literal["even", "tldr", "chat"] = "even"
    """Lengths of prompts: one, or log-normal ones, the longest 2 (tldr) or 8 (chat) times the median."""
    batch_size: int = setting(64, ge=1)
    """Rollouts of a batch, all decoded together."""
    num_batches: int = setting(4, ge=2)
    """Batches of a measurement; the first is not counted."""
    num_repeats: int = setting(3, ge=1)
    """Rounds of measurements."""
    num_threads: int = setting(2, ge=1)
    """OMP_NUM_THREADS of every process."""
    enforce_eager: bool = False
    """rollout.vllm.enforce_eager."""
    only: Literal["native", "vllm"] | None = None
    """Measure this engine alone, in this process, with the inputs that are in run_dir; null: both, each in its own."""
    seed: int = setting(0, ge=0)
    """Seed of prompts, weights and rollouts."""

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest row."""
        longest_prompt, _ = longest(self.lengths, self.prompt_length, self.response_length)
        return longest_prompt + self.response_length


def run(recipe: RolloutSpeedRecipe) -> Path:
    """Measure, compare, and write the table; or measure one engine in this process."""
    check_installed()
    root = Path(recipe.run_dir).resolve()
    if recipe.only is not None:
        return measure(recipe, root, recipe.only)
    shape = Shape(recipe.hidden_size, recipe.num_layers, 4 * recipe.hidden_size, recipe.vocab_size)
    lengths = (recipe.prompt_length, recipe.response_length)
    make_models(root, shape, max(1, recipe.hidden_size // 32), recipe.max_tokens, recipe.seed)
    make_texts(root, recipe.vocab_size, *lengths, recipe.batch_size, recipe.seed)
    rounds: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    for repeat in range(recipe.num_repeats):
        for engine in ENGINES if repeat % 2 == 0 else ENGINES[::-1]:
            settings = root / f"{engine}_{repeat}.yaml"
            settings.write_text(yaml.safe_dump(asdict(recipe) | {"only": engine}))
            log = settings.with_suffix(".log")
            call(recipe.num_threads, [str(Path(__file__).resolve()), str(settings)], log, root)
            rounds[engine].append(json.loads((root / f"{engine}.json").read_text()))
            print(f"{engine}, repeat {repeat}: {rounds[engine][-1]}", flush=True)
    results = compare(rounds["native"], rounds["vllm"])
    return write_results(root, results, markdown(results))


def measure(recipe: RolloutSpeedRecipe, root: Path, name: str) -> Path:
    """Roll out from the same prompts `num_batches` times; write tokens per second, and how the engines agree."""
    tokenizer = load_tokenizer(str(root / "policy"))
    policy = load_policy(ModelConfig(path=str(root / "policy")), tokenizer, recipe.seed)
    engine = Engine(EngineConfig(mixed_precision="no", trackers=[]), root, recipe.seed, None)
    vocabulary = vocabulary_of(tokenizer, policy.config.vocab_size)
    vllm = None
    if name == "vllm":
        config = VLLMConfig(enforce_eager=recipe.enforce_eager)
        vllm = VLLMEngine(config, engine, policy, vocabulary, recipe.batch_size, recipe.max_tokens)
    sampling = SamplingConfig(temperature=0.7)
    generator = Generator(
        *(policy, tokenizer, vocabulary, sampling, recipe.response_length, recipe.batch_size), vllm=vllm
    )
    lines = (root / f"{recipe.lengths}_pairs.jsonl").read_text().splitlines()
    contexts = [tokenizer(json.loads(line)["prompt"]).input_ids for line in lines]
    rates = []
    for batch in range(recipe.num_batches):
        draws = [(batch, row) for row in range(len(contexts))]
        start = time.perf_counter()
        with generator.ready(engine):
            new = generator.generate(contexts, [recipe.response_length] * len(contexts), draws, logprobs=True)
        rates.append(sum(map(len, new.tokens)) / (time.perf_counter() - start))
    batch = pad_batch(contexts, new.tokens, vocabulary.pad_id)
    settings = {"temperature": 0.7, "suppressed_ids": vocabulary.suppressed_ids}
    with torch.no_grad():
        expected = response_logprobs(policy, batch, **settings).logprobs[batch.response_mask]
    found = torch.tensor([value for values in new.logprobs for value in values])
    result = {
        "tokens_per_second": float(np.median(rates[1:])),
        "difference": float((found - expected).abs().mean()),
    }
    engine.close()
    (root / f"{name}.json").write_text(json.dumps(result))
    return root / f"{name}.json"


def compare(native: list[dict[str, float]], vllm: list[dict[str, float]]) -> dict[str, Any]:
    """Return medians over the rounds, and the ratio of each round."""
    pairs = list(zip(native, vllm, strict=True))
    return {
        "native": float(np.median([side["tokens_per_second"] for side in native])),
        "vllm": float(np.median([side["tokens_per_second"] for side in vllm])),
        "faster": [new["tokens_per_second"] / old["tokens_per_second"] for old, new in pairs],
        "difference": max(side["difference"] for side in vllm),
    }


def markdown(results: dict[str, Any]) -> str:
    """Format the table: medians over the rounds, and the range of the ratios."""
    return markdown_table(
        [
            {
                "native, tokens/s": f"{results['native']:.0f}",
                "vLLM, tokens/s": f"{results['vllm']:.0f}",
                "times faster": median_and_range(results["faster"]),
                "log-probs differ by": f"{results['difference']:.1e}",
            }
        ]
    )


if __name__ == "__main__":
    main(RolloutSpeedRecipe, "demo/rollout_speed.yaml", run)
