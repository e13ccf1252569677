"""A reward model: a backbone with a scalar head, and how the head's outputs become one score a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from drpo.models.scalar_head import ScalarModel, ScalarModelConfig
from drpo.models.shared_prompt import continuation_hidden
from drpo.tensors import PaddedBatch, masked_sum

Aggregation = Literal["last", "sum"]


class RewardModelConfig(ScalarModelConfig):
    """Config of a RewardModel: a scalar model's, with aggregation, zero and unit of the score, and chat template.

    `chat_template` is whether the training texts went through the tokenizer's chat template (None: unknown), and
    `chat_template_kwargs` are the arguments of that template. `score_normalised` names what an exported model's head
    contains already: "centre", "scale" or both.
    """

    model_type = "drpo_reward_model"

    def __init__(
        self,
        aggregation: Aggregation = "last",
        centre: float = 0.0,
        scale: float = 1.0,
        chat_template: bool | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        score_normalised: Sequence[str] = (),
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        if aggregation not in ("last", "sum"):
            raise ValueError(f"aggregation must be last or sum, got {aggregation!r}")
        self.aggregation = aggregation
        if not scale > 0:
            raise ValueError(f"scale must be > 0, got {scale!r}")
        self.centre = centre
        self.scale = scale
        self.chat_template = chat_template
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.score_normalised = list(score_normalised)

    def was_given(self, what: Literal["centre", "scale"]) -> bool:
        """Return whether the score has a zero ("centre") or a unit ("scale") that was measured on references."""
        default = {"centre": 0.0, "scale": 1.0}[what]
        return getattr(self, what) != default or what in self.score_normalised


class RewardModel(ScalarModel):
    """score(x, y) = (aggregate_t head(hidden(x, y_<=t)) - centre) / scale."""

    config_class = RewardModelConfig

    def score(self, batch: PaddedBatch, num_continuations: int = 1) -> Tensor:
        """Return the scores (K*B,), float32, of K blocks of responses to B queries, stop token included."""
        hidden = continuation_hidden(self, batch, num_continuations)
        return self.scores_of(hidden[:, 1:], batch.response_mask)

    def scores_of(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the scores (B,) of responses from the hidden states at their tokens, (B, R, H) with mask (B, R)."""
        raw = aggregate(self.head(hidden), mask, self.config.aggregation)
        return (raw - self.config.centre) / self.config.scale


def aggregate(outputs: Tensor, mask: Tensor, aggregation: Aggregation) -> Tensor:
    """Aggregate token outputs (B, R) to scores (B,): the output at the last real token, or the sum over real tokens.

    The sum scores every token in its place, so an error in the middle of a response contributes directly; the last
    token alone must detect it from the end. Raises ValueError when a response has no token, and so no score.
    """
    empty = mask.any(dim=1).logical_not().nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"the responses of rows {empty} have no token, so there is nothing to score")
    if aggregation == "sum":
        return masked_sum(outputs, mask, dim=1)
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, columns, -1).amax(dim=1)
    return outputs.gather(1, last[:, None]).squeeze(1)


AutoConfig.register(RewardModelConfig.model_type, RewardModelConfig)
AutoModel.register(RewardModelConfig, RewardModel)
