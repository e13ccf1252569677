"""KTO: the loss of single responses that are labelled good or bad (Ethayarajh et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drpo.data.encode import Example
from drpo.data.records import DataError
from drpo.microbatches import Lengths
from drpo.models.scoring import response_logprobs
from drpo.preference_losses import kto_loss
from drpo.tensors import PaddedBatch, masked_sum, pad_batch
from drpo.trainers.offline import Objective, RowMetrics
from drpo.trainers.preference.recipe import LossConfig
from drpo.trainers.reference import Reference, policy_and_reference


@dataclass(frozen=True, slots=True)
class LabelledResponse:
    """One response with its label, and a response to another prompt, which estimates the KL."""

    example: Example
    desirable: bool
    other_ids: list[int]


@dataclass(frozen=True, eq=False)
class LabelledBatch:
    """B responses, `padded`; `mismatched` contains the same queries with responses to other prompts."""

    padded: PaddedBatch
    mismatched: PaddedBatch
    desirable_mask: Tensor

    def __len__(self) -> int:
        return len(self.desirable_mask)


def make_labelled(examples: Sequence[Example]) -> list[LabelledResponse]:
    """Pair each example with the response of the next one that has another prompt.

    The partner is fixed by the data alone, so that micro-batches and processes do not change the estimate.
    Raises DataError when all prompts are the same.
    """
    if not examples:
        return []
    items: list[LabelledResponse] = []
    partner: Example | None = None
    for example in reversed([*examples, *examples]):  # the second copy: the first example follows the last
        following = items[-1].example if items else None
        if following is not None and following.record.marked_prompt != example.record.marked_prompt:
            partner = following
        other_ids = partner.completion_ids if partner is not None else []
        items.append(LabelledResponse(example, bool(example.record.extra["label"]), other_ids))
    if partner is None:
        raise DataError(
            "loss.name=kto compares responses to different prompts, and all prompts here are the same"
        )
    return items[::-1][: len(examples)]


class UnpairedObjective(Objective):
    """KTO around the policy, with step statistics: z0, the reference point of all losses, is a step mean."""

    needs_step_statistics = True

    def __init__(
        self, model: nn.Module, loss: LossConfig, *, reference: Reference, pad_id: int, device: torch.device
    ) -> None:
        super().__init__(model, pad_id, device)
        self._loss, self._reference = loss, reference

    def collate(self, items: Sequence[LabelledResponse]) -> LabelledBatch:
        queries = [item.example.query_ids for item in items]
        responses = [item.example.completion_ids for item in items]
        other_responses = [item.other_ids for item in items]
        return LabelledBatch(
            pad_batch(queries, responses, self._pad_id).to(self._device),
            pad_batch(queries, other_responses, self._pad_id).to(self._device),
            torch.tensor([item.desirable for item in items], device=self._device),
        )

    def lengths(self, item: LabelledResponse) -> Lengths:
        return len(item.example.query_ids), max(len(item.example.completion_ids), len(item.other_ids))

    def step_statistics(self, losses: Tensor, row_metrics: RowMetrics) -> Tensor:
        """Compute z0 = max(0, mean of log pi/pi_ref over responses to other prompts), an estimate of KL(pi, pi_ref)."""
        return row_metrics["mismatched_logratio"].mean().clamp(min=0).float().to(self._device)

    def forward(
        self, batch: LabelledBatch, step_statistics: Tensor | None = None
    ) -> tuple[Tensor, RowMetrics]:
        if step_statistics is None:  # first forward: only the inputs of z0
            mismatched = self._logratios(batch.mismatched)
            return torch.zeros_like(mismatched), {"mismatched_logratio": mismatched}
        config = self._loss
        logratios = self._logratios(batch.padded)
        losses = kto_loss(
            logratios,
            batch.desirable_mask,
            step_statistics,
            config.beta,
            config.desirable_weight or 1.0,
            config.undesirable_weight or 1.0,
        )
        return losses, {
            "reward": config.beta * logratios,
            "reference_point": step_statistics.expand(len(batch)),
            "desirable": batch.desirable_mask,
            "accuracy": (logratios > step_statistics) == batch.desirable_mask,
        }

    def _logratios(self, batch: PaddedBatch) -> Tensor:
        """Compute log pi/pi_ref of each response (b,)."""
        policy, reference = policy_and_reference(self.model, self._reference, response_logprobs, batch)
        return masked_sum(policy.logprobs - reference.logprobs, batch.response_mask, dim=1)

    def summarise(self, losses: Tensor, row_metrics: RowMetrics) -> dict[str, float]:
        """Return means of the numbers, and the mean reward of desirable and of undesirable responses."""
        metrics = super().summarise(losses, row_metrics)
        desirable = row_metrics["desirable"].bool()
        for name, mask in (("desirable", desirable), ("undesirable", desirable.logical_not())):
            if mask.any():
                metrics[f"reward_{name}"] = float(row_metrics["reward"][mask].mean())
        return metrics
