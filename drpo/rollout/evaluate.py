"""Held-out evaluation during training: completions of bare prompts at their own temperature, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from drpo.config import ConfigError
from drpo.data.encode import Example
from drpo.engine import Engine
from drpo.models.scoring import response_logprobs
from drpo.rewards import RewardFn, kl_estimate
from drpo.rollout.collect import RolloutConfig, Start, Vocabulary, call_reward_fn, completions_of
from drpo.rollout.sampler import SamplingConfig, draw_uniforms, generate
from drpo.rollout.samples import evaluation_sample
from drpo.tensors import PaddedBatch, masked_sum, pad_batch

EVAL_SEED_OFFSET = 1_000_003  # the random numbers of evaluation are not those of any rollout


@dataclass(frozen=True)
class EvalConfig:
    """When and how the policy is evaluated on held-out prompts."""

    every: int = 50
    """Evaluate after every so many steps, and after the last; 0 for never."""
    num_prompts: int = 64
    """How many held-out prompts, the same ones every time."""
    temperature: float = 0.01
    """Sampling temperature of the evaluation; 0 is greedy."""
    reward_functions: dict[str, str] = field(default_factory=dict)
    """Further scores to report, name: module:function."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"eval.every must be >= 0, got {self.every}")
        if self.num_prompts < 1:
            raise ValueError(f"eval.num_prompts must be >= 1, got {self.num_prompts}")
        if self.temperature < 0:
            raise ValueError(f"eval.temperature must be >= 0, got {self.temperature}")
        if taken := {"score", "kl", "log_ratio", "length", "ended"} & set(self.reward_functions):
            raise ValueError(f"eval.reward_functions: {sorted(taken)} are names of other metrics")


@torch.no_grad()
def evaluate(
    config: EvalConfig,
    engine: Engine,
    *,
    policy,
    reference_logprobs: Callable[[PaddedBatch], Tensor] | None,
    examples: Sequence[Example],
    rewards: Mapping[str, RewardFn],
    tokenizer,
    vocabulary: Vocabulary,
    rollout: RolloutConfig,
    seed: int,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics `eval/<name>` over the first `num_prompts` held-out prompts, and the completions as sample rows.

    The random numbers depend on (seed, prompt) alone, so runs and steps are compared on the same draws. With a
    reference there is the mean over completions of sum_t log pi/pi_ref under the rollout temperature, the one at
    which the policy was trained: `eval/kl` when the completions are drawn at it too, else `eval/log_ratio`, for
    then it estimates no KL. Processes share the prompts. Raises ConfigError when there are none.
    """
    if not examples:
        raise ConfigError(
            "there are no held-out prompts to evaluate on; set data.eval_split or data.eval_fraction, or turn the "
            "evaluation off with eval.every=0"
        )
    mine = list(enumerate(examples[: config.num_prompts]))[engine.rank :: engine.world_size]
    starts = [Start(episode, example, (), 0) for episode, example in mine]
    results: list[tuple[int, dict[str, float], dict[str, Any]]] = []
    if starts:
        responses = generate(
            policy,
            [list(start.example.query_ids) for start in starts],
            [rollout.max_response_length] * len(starts),
            draw_uniforms(
                seed + EVAL_SEED_OFFSET, [start.episode for start in starts], rollout.max_response_length
            ),
            sampling=SamplingConfig(temperature=config.temperature),
            stop_ids=vocabulary.stop_ids,
            suppressed_ids=vocabulary.suppressed_ids,
            batch_size=rollout.generation_batch_size,
        )
        completions = completions_of(starts, responses, vocabulary, tokenizer)
        scores = {name: call_reward_fn(fn, completions).tolist() for name, fn in rewards.items()}
        if reference_logprobs is not None:
            name = "kl" if config.temperature == rollout.sampling.temperature else "log_ratio"
            scores[name] = _log_ratio(
                policy, reference_logprobs, starts, responses, vocabulary, rollout, engine.device
            )
        for row, (start, completion) in enumerate(zip(starts, completions, strict=True)):
            numbers = {name: values[row] for name, values in scores.items()}
            measured = {
                **numbers,
                "length": float(len(responses[row])),
                "ended": float(completion.ended),
            }
            results.append((start.episode, measured, evaluation_sample(completion, numbers)))
    everything = sorted(engine.gather_objects(results), key=lambda result: result[0])
    names = everything[0][1]
    means = {f"eval/{name}": sum(r[1][name] for r in everything) / len(everything) for name in names}
    return means, [row for _, _, row in everything]


def _log_ratio(
    policy,
    reference_logprobs: Callable[[PaddedBatch], Tensor],
    starts: Sequence[Start],
    responses: Sequence[Sequence[int]],
    vocabulary: Vocabulary,
    rollout: RolloutConfig,
    device: torch.device,
) -> list[float]:
    """sum_t log pi/pi_ref of each completion, at the rollout temperature."""
    kl: list[float] = []
    size = rollout.generation_batch_size
    for first in range(0, len(starts), size):
        rows = range(first, min(first + size, len(starts)))
        batch = pad_batch(
            [starts[row].example.query_ids for row in rows],
            [responses[row] for row in rows],
            vocabulary.pad_id,
        ).to(device)
        logprobs = response_logprobs(
            policy,
            batch,
            temperature=rollout.sampling.temperature,
            suppressed_ids=vocabulary.suppressed_ids,
        ).logprobs
        k1 = kl_estimate(logprobs.float(), reference_logprobs(batch).float(), "k1")
        kl += masked_sum(k1, batch.response_mask, dim=1).tolist()
    return kl
