"""A saved tiny reward model, and its score of one response worked out alone."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import tiny_model

from reward_models.model import RewardModel


def save_reward_model(folder: Path, tokenizer, aggregation: str = "last", seed: int = 3) -> RewardModel:
    model = RewardModel.from_causal_lm(
        tiny_model("gpt_neox", vocab_size=len(tokenizer), seed=seed), seed=seed
    ).eval()
    model.config.aggregation, model.config.centre = aggregation, 0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@torch.no_grad()
def score_alone(model: RewardModel, query: list[int], response: list[int]) -> float:
    hidden = model.backbone(torch.tensor([query + response])).last_hidden_state[0, len(query) :]
    outputs = [float((h * model.head.weight[0]).sum() + model.head.bias) for h in hidden]
    return (sum(outputs) if model.config.aggregation == "sum" else outputs[-1]) - model.config.centre
