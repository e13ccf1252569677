"""One batch of rollouts: tokens, masks, and the measurements at sampling time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from drpo.tensors import PaddedBatch


@dataclass(frozen=True, eq=False)
class Trajectory:
    """B rollouts, rows first.

    `response_mask` covers the real response tokens, the stop token included; `action_mask` those of them that
    the policy sampled, that is, all but the forced prefix of `reset_lengths` tokens.
    """

    queries: Tensor
    """(B, Q) prompt ids, left-padded."""
    query_mask: Tensor
    """(B, Q) bool."""
    responses: Tensor
    """(B, R) forced prefix and sampled continuation, right-padded."""
    response_mask: Tensor
    """(B, R) bool."""
    reset_lengths: Tensor
    """(B,) int64, h: how many response tokens were forced."""
    source_lengths: Tensor
    """(B,) int64, length of the dataset response reset to; 0 for rollouts from the prompt."""
    ended: Tensor
    """(B,) bool, a stop token was sampled."""
    scores: Tensor
    """(B,) float32, raw reward."""
    logprobs: Tensor
    """(B, R) float32, under the policy that sampled."""
    ref_logprobs: Tensor
    """(B, R) float32, under the reference."""
    entropy: Tensor
    """(B, R) float32, of the policy that sampled, in nats."""
    values: Tensor | None = None
    """(B, R) float32, V before each response token; None without a critic."""
    trunk: Tensor | None = None
    """(B, Q+R, H), output of the frozen layers that all models share (drpo.models.trunk); None where there are none."""

    @property
    def batch(self) -> PaddedBatch:
        return PaddedBatch(self.queries, self.query_mask, self.responses, self.response_mask)

    @property
    def action_mask(self) -> Tensor:
        """(B, R) bool: tokens that the policy sampled, t >= h."""
        positions = torch.arange(self.responses.shape[1], device=self.responses.device)
        return self.response_mask & (positions[None, :] >= self.reset_lengths[:, None])

    @property
    def is_reset(self) -> Tensor:
        """(B,) bool: starts from a dataset prefix."""
        return self.reset_lengths > 0

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: response tokens, prefix and stop token included."""
        return self.response_mask.sum(dim=1)

    def map(self, function: Callable[[Tensor], Tensor]) -> Trajectory:
        """Apply a function to every field that is not None."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Trajectory(**{n: value if value is None else function(value) for n, value in values.items()})
