"""Completions of held-out prompts that offline stages sample at every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from drpo.data.encode import Example
from drpo.engine import Engine
from drpo.rewards import RewardFn
from drpo.rollout.collect import RolloutConfig, vocabulary_of
from drpo.rollout.evaluate import EvalConfig, evaluate
from drpo.rollout.sampler import SamplingConfig
from drpo.tensors import PaddedBatch


@dataclass(frozen=True)
class SampleConfig:
    """Completions of held-out prompts that are written at every evaluation."""

    num_prompts: int = 16
    """How many held-out prompts; 0 for none."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    max_response_length: int = 53
    """Longest completion in tokens."""
    reward_functions: dict[str, str] = field(default_factory=dict)
    """Scores to report of them, name: module:function."""

    def __post_init__(self) -> None:
        if self.num_prompts < 0:
            raise ValueError(f"sample.num_prompts must be >= 0, got {self.num_prompts}")
        if self.temperature < 0:
            raise ValueError(f"sample.temperature must be >= 0, got {self.temperature}")
        if self.max_response_length < 1:
            raise ValueError(f"sample.max_response_length must be >= 1, got {self.max_response_length}")
        if taken := {"loss", "kl", "length", "ended"} & set(self.reward_functions):
            raise ValueError(f"sample.reward_functions: {sorted(taken)} are names of other metrics")


def held_out_sampler(
    config: SampleConfig,
    engine: Engine,
    *,
    policy: nn.Module,
    tokenizer,
    examples: Sequence[Example],
    rewards: Mapping[str, RewardFn],
    seed: int,
    reference_logprobs: Callable[[PaddedBatch], Tensor] | None = None,
) -> Callable[[], tuple[dict[str, float], list[dict[str, Any]]]] | None:
    """A function that samples one completion of each prompt and gives metrics and sample rows; None for no samples.

    With a reference the metrics have `eval/kl`, the mean of log pi/pi_ref over the completions in nats: an
    estimate of KL(pi, pi_ref) at sampling temperature 1.
    """
    if not config.num_prompts or not examples:
        return None
    rollout = RolloutConfig(
        max_response_length=config.max_response_length, sampling=SamplingConfig(temperature=1.0)
    )
    vocabulary = vocabulary_of(rollout, tokenizer, policy.config.vocab_size)
    settings = EvalConfig(num_prompts=config.num_prompts, temperature=config.temperature)

    def sample() -> tuple[dict[str, float], list[dict[str, Any]]]:
        with engine.autocast():
            return evaluate(
                settings,
                engine,
                policy=policy,
                reference_logprobs=reference_logprobs,
                examples=examples,
                rewards=rewards,
                tokenizer=tokenizer,
                vocabulary=vocabulary,
                rollout=rollout,
                seed=seed,
            )

    return sample
