"""Supervised fine-tuning on demonstrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from drpo.config import ConfigError
from drpo.data.encode import Example
from drpo.data.load import DataConfig, load_examples, load_texts
from drpo.data.stop import with_stop_token
from drpo.engine import Engine
from drpo.microbatches import Lengths
from drpo.models.loading import ModelConfig, load_policy
from drpo.models.positions import check_examples
from drpo.models.scoring import response_logprobs
from drpo.models.tokenizer import load_tokenizer, train_tokenizer
from drpo.rewards import RewardFn
from drpo.rollout.held_out import SampleConfig, held_out_sampler
from drpo.run.folder import Callback, RunFolder
from drpo.run.result import Result
from drpo.tensors import PaddedBatch, masked_sum, pad_batch
from drpo.trainers.offline import Objective, OfflineRecipe, RowMetrics, fit


@dataclass(frozen=True)
class SFTRecipe(OfflineRecipe):
    """All settings of an SFT run."""

    run_dir: str = "runs/sft"
    """Folder of the run."""
    loss_on: Literal["response", "all"] = "response"
    """Tokens that carry loss: those of the response, or those of the prompt too."""
    sample: SampleConfig = field(default_factory=SampleConfig)


class SFTObjective(Objective):
    """Negative log-likelihood: sum over target tokens of -log pi(token | the tokens before it)."""

    def __init__(self, model, pad_id: int, loss_on: str, device: torch.device) -> None:
        super().__init__(model, pad_id, device)
        self._loss_on = loss_on

    def collate(self, examples: Sequence[Example]) -> PaddedBatch:
        queries = [example.query_ids for example in examples]
        responses = [example.completion_ids for example in examples]
        if self._loss_on == "all":  # every token after the first is a target
            responses = [query[1:] + response for query, response in zip(queries, responses, strict=True)]
            queries = [query[:1] for query in queries]
        return pad_batch(queries, responses, self._pad_id).to(self._device)

    def lengths(self, example: Example) -> Lengths:
        return len(example.query_ids), len(example.completion_ids)

    def num_targets(self, batch: PaddedBatch) -> int:
        return int(batch.response_mask.sum())

    def forward(self, batch: PaddedBatch) -> tuple[Tensor, RowMetrics]:
        logprobs = response_logprobs(self.model, batch).logprobs
        return masked_sum(-logprobs, batch.response_mask, dim=1), {}


def train(
    recipe: SFTRecipe, engine: Engine, rewards: Mapping[str, RewardFn], callbacks: Sequence[Callback] = ()
) -> Path:
    """Run the recipe and return the folder of the policy. `rewards` score the held-out samples, by name."""
    run = RunFolder(recipe, engine, callbacks)
    tokenizer = tokenizer_for(recipe.model, recipe.data)
    splits = load_examples(recipe.data, tokenizer, "demonstrations")
    run.take_data(splits.report, splits.train_digest())
    policy = load_policy(recipe.model, tokenizer, recipe.seed)
    run.say(*check_examples(policy, [*splits.train, *splits.eval]))
    objective = SFTObjective(policy, tokenizer.pad_token_id, recipe.loss_on, engine.device)
    sample = held_out_sampler(run, policy, tokenizer, splits.eval, rewards)
    result = Result(run, objective, policy, tokenizer, splits.report, "policy")
    fit(run, objective, [splits.train], splits.eval, name="SFT", result=result, sample=sample)
    return result.finish()


def tokenizer_for(model: ModelConfig, data: DataConfig):
    """Return the model's tokenizer, or for a model from scratch one trained on the data.

    Its eos token is the one that ends responses.
    """
    if model.tokenizer or model.path:
        key = "model.tokenizer" if model.tokenizer else "model.path"
        return with_stop_token(load_tokenizer(model.tokenizer or model.path, key), data)
    if not model.architecture:
        raise ConfigError("no model: give model.path, or model.architecture for one from scratch")
    return with_stop_token(train_tokenizer(load_texts(data), model.vocab_size), data)
