"""Completions of held-out prompts that offline stages sample at every evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from drpo.data.encode import Example
from drpo.engine import Engine
from drpo.models.loading import LoraConfig, ModelConfig, load_policy
from drpo.models.positions import check_sampling
from drpo.models.scoring import response_logprobs
from drpo.models.stops import stop_ids
from drpo.models.vocabulary import check_same_vocabulary
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
    kl_reference: str | None = None
    """Folder or hub id of a policy to measure eval/kl to (at other temperatures than 1: eval/log_ratio), kept in memory
    besides; null: the reference of the loss, if it is in memory and does not move, else neither."""

    def __post_init__(self) -> None:
        if self.num_prompts < 0:
            raise ValueError(f"sample.num_prompts must be >= 0, got {self.num_prompts}")
        if self.temperature < 0:
            raise ValueError(f"sample.temperature must be >= 0, got {self.temperature}")
        if self.max_response_length < 1:
            raise ValueError(f"sample.max_response_length must be >= 1, got {self.max_response_length}")
        if taken := {"loss", "kl", "log_ratio", "length", "ended"} & set(self.reward_functions):
            raise ValueError(f"sample.reward_functions: {sorted(taken)} are names of other metrics")


def held_out_sampler(
    config: SampleConfig,
    engine: Engine,
    *,
    policy: nn.Module,
    tokenizer,
    examples: Sequence[Example],
    rewards: Mapping[str, RewardFn],
    model: ModelConfig,
    seed: int,
    reference_logprobs: Callable[[PaddedBatch], Tensor] | None = None,
) -> Callable[[], tuple[dict[str, float], list[dict[str, Any]]]] | None:
    """A function that samples a completion of each distinct prompt and gives metrics and sample rows, or None.

    With `reference_logprobs`, or a policy at `config.kl_reference` (loaded as `model` says), the metrics have
    the mean over completions of log pi/pi_ref in nats: `eval/kl`, which estimates KL(pi, pi_ref), when they are
    sampled at temperature 1, else `eval/log_ratio`, which does not.
    """
    if not config.num_prompts or not examples:
        return None
    key = "sample.max_response_length"
    check_sampling(policy, examples, config.max_response_length, "model.path", key)
    rollout = RolloutConfig(
        max_response_length=config.max_response_length, sampling=SamplingConfig(temperature=1.0)
    )
    if config.kl_reference is not None:
        check_same_vocabulary(tokenizer, config.kl_reference, "sample.kl_reference")
        whole = {"architecture": {}, "tokenizer": None, "vocab_size": None, "trainable_layers": None}
        source = replace(model, path=config.kl_reference, lora=LoraConfig(), **whole)
        frozen = engine.place(load_policy(source, tokenizer, seed, "sample.kl_reference"), as_trained=True)
        check_sampling(frozen, examples, config.max_response_length, "sample.kl_reference", key)
        reference_logprobs = functools.partial(_logprobs, frozen)
    prompts = list({example.record.marked_prompt: example for example in reversed(examples)}.values())[::-1]
    vocabulary = vocabulary_of(rollout, tokenizer, policy.config.vocab_size, stop_ids(policy))
    settings = EvalConfig(num_prompts=config.num_prompts, temperature=config.temperature)

    def sample() -> tuple[dict[str, float], list[dict[str, Any]]]:
        with engine.autocast():
            return evaluate(
                settings,
                engine,
                policy=policy,
                reference_logprobs=reference_logprobs,
                examples=prompts,
                rewards=rewards,
                tokenizer=tokenizer,
                vocabulary=vocabulary,
                rollout=rollout,
                seed=seed,
            )

    return sample


def _logprobs(model: nn.Module, batch: PaddedBatch) -> Tensor:
    return response_logprobs(model, batch).logprobs
