"""What a real vLLM engine does with a tiny policy, as JSON on the last line; in a process of its own.

vllm_checks.py <model_type> <full | lora> <bf16 | no> [url of a server]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from tiny_models import move_weights, tiny_model

from drpo.engine import Engine, EngineConfig
from drpo.models.adapters import add_lora
from drpo.models.scoring import response_logprobs
from drpo.rollout.generator import Generator
from drpo.rollout.sampler import SamplingConfig, Vocabulary
from drpo.rollout.vllm_engine import VLLMEngine
from drpo.rollout.vllm_requests import VLLMConfig
from drpo.rollout.vllm_servers import VLLMServers
from drpo.tensors import pad_batch

PAD, STOP, OTHER_STOP = 2, 1, 9
SUPPRESSED = (PAD, 40, 41, 60)
TEMPERATURE = 0.7
LIMIT = 24
# The second row continues the first, as a reset does; the third repeats it; the fourth is longer than a block, so that
# its keys and values are kept for the next call; the last has no token left.
CONTEXTS = [[5, 6, 7, 8], [5, 6, 7, 8, 30, 31], [5, 6, 7, 8], [*range(3, 40)] * 4, [10, 11], [10]]
MAX_TOKENS = 180
BUDGETS = [LIMIT, LIMIT - 2, LIMIT, 3, 1, 0]
# vLLM's kernels for CPUs take heads from 32 numbers on.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 256}


def main(model_type: str, trained: str, precision: str, *urls: str) -> None:
    sizes = SIZES | ({"num_key_value_heads": 1} if model_type == "llama" else {})
    policy = tiny_model(model_type, **sizes)
    if trained == "lora":
        policy = add_lora(policy, r=2, alpha=4.0, target_modules=None, seed=0)
    with tempfile.TemporaryDirectory() as run_dir:
        engine = Engine(EngineConfig(mixed_precision=precision, trackers=[]), Path(run_dir), 0, None)
        state = torch.random.get_rng_state()
        vocabulary = Vocabulary(PAD, (STOP, OTHER_STOP), SUPPRESSED)
        if urls:
            vllm = VLLMServers(VLLMConfig(urls=list(urls)), engine, vocabulary, 64, MAX_TOKENS)
        else:
            vllm = VLLMEngine(VLLMConfig(enforce_eager=True), engine, policy, vocabulary, 64, MAX_TOKENS)
        result = {"random_state_kept": torch.equal(state, torch.random.get_rng_state())}
        sampling = SamplingConfig(temperature=TEMPERATURE)
        generator = Generator(policy, None, vocabulary, sampling, LIMIT, 8, vllm=vllm)
        result |= measure(generator, engine)
        tiny_model(model_type, **sizes)(torch.tensor([[3, 4]]))  # transformers' classes are as before
        engine.close()
    print(json.dumps(result))


def measure(generator: Generator, engine: Engine) -> dict:
    differences, rows = [], []
    for seed in range(3):  # before any update, and after two
        with generator.synced():
            rows += sample(generator, seed)
            differences.append(difference(generator, engine, seed))
            if seed == 2:
                move_weights(generator.policy, seed)
                stale = difference(generator, engine, seed)
        move_weights(generator.policy, seed)
    with generator.synced():
        first, again = (sample(generator, 5) for _ in range(2))
        alone = generator.generate(CONTEXTS[1:2], BUDGETS[1:2], [(5, 1)]).tokens[0]
        # 5,920 tokens: more than vLLM computes at once.
        long_rows = [[first, *range(4, 40)] * 4 for first in range(40, 80)]
        long_rows = [[token % 60 for token in row] for row in long_rows]
        many = generator.generate(long_rows, [2] * 40, [(6, row) for row in range(40)]).tokens
        too_long = error_of(lambda: generator.generate([[3] * 160], [LIMIT], [(0, 0)]))
    return {
        "mean_differences": [mean for mean, _ in differences],
        "max_differences": [largest for _, largest in differences],
        "stale_difference": stale[0],
        "rows": rows,
        "repeated": first == again,
        "alone_equal": alone == first[1],
        "too_long": too_long,
        "lengths_of_many": [len(row) for row in many],
    }


def error_of(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def draws(seed: int) -> list[tuple[int, int]]:
    return [(seed, number) for number in range(len(CONTEXTS))]


def sample(generator: Generator, seed: int) -> list[list[int]]:
    return generator.generate(CONTEXTS, BUDGETS, draws(seed)).tokens


def difference(generator: Generator, engine: Engine, seed: int) -> tuple[float, float]:
    """Mean and largest |log-prob of vLLM - log-prob of the trainer| of sampled tokens."""
    found = generator.generate(CONTEXTS, BUDGETS, draws(seed), logprobs=True)
    batch = pad_batch(CONTEXTS[:-1], found.tokens[:-1], PAD)
    settings = {"temperature": TEMPERATURE, "suppressed_ids": SUPPRESSED}
    with torch.no_grad(), engine.autocast():
        expected = response_logprobs(generator.policy, batch, **settings).logprobs.float()
    differences = torch.cat(
        [
            (torch.tensor(values) - expected[row, : len(values)]).abs()
            for row, values in enumerate(found.logprobs[:-1])
        ]
    )
    return float(differences.mean()), float(differences.max())


if __name__ == "__main__":
    main(*sys.argv[1:])
