"""One batch of rollouts: tokens, masks and scores, and the models' measurements of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from drpo.tensors import PaddedBatch

Rows = TypeVar("Rows", bound="Rollouts")


class Microbatch(NamedTuple):
    """Rows of one forward, and the longest query and response among them."""

    rows: Tensor
    """(b,) int64."""
    query_length: int
    response_length: int
    num_continuations: int = 1
    """K: the rows are K blocks with the same queries (drpo.models.shared_prompt)."""

    def responses(self, values: Tensor) -> Tensor:
        """Select values (B, R, ...) of the response tokens, (b, response_length, ...)."""
        return values[self.rows, : self.response_length]


@dataclass(frozen=True, eq=False, kw_only=True)
class Continuations:
    """K further continuations of each of B rollouts from S states within it, which the policy is not trained on."""

    positions: Tensor
    """(B, S) int64, increasing: the response token that a state is before; -1 where a row has fewer states."""
    scores: Tensor
    """(B, S, K) float32, raw reward of the whole response; 0 where there is no state, as in the fields below."""
    ended: Tensor
    """(B, S, K) bool, a stop token was sampled."""
    lengths: Tensor
    """(B, S, K) int64, tokens of the whole response."""

    @property
    def mask(self) -> Tensor:
        """(B, S) bool: there is a state."""
        return self.positions >= 0

    @property
    def num_sampled(self) -> Tensor:
        """(B, S, K) int64: tokens sampled after the state."""
        return torch.where(self.mask.unsqueeze(2), self.lengths - self.positions.unsqueeze(2), 0)

    def by_token(self, numbers: Tensor, length: int) -> Tensor:
        """Place numbers (B, S) of the states at their response tokens, (B, length); 0 elsewhere."""
        rows, states = self.mask.nonzero(as_tuple=True)
        placed = numbers.new_zeros(len(numbers), length)
        placed[rows, self.positions[rows, states]] = numbers[rows, states]
        return placed

    def map(self, function: Callable[[Tensor], Tensor]) -> Continuations:
        """Apply a function to every tensor."""
        return Continuations(**{name: function(value) for name, value in vars(self).items()})


@dataclass(frozen=True, eq=False, kw_only=True)
class Rollouts:
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
    reward_names: tuple[str, ...] = ()
    """Names of D further numbers that the reward function gave (drpo.rewards.DetailedScores)."""
    reward_details: Tensor | None = None
    """(B, D) float32, these numbers; None without any."""
    rollouts_together: int = 1
    """Consecutive rows that share their query, if it may be computed once for all of them; else 1."""
    engine_logprobs: Tensor | None = None
    """(B, R) float32, of the sampled tokens under the rollout engine that sampled, 0 elsewhere; None without one."""
    trunk: Tensor | None = None
    """(B, Q+R, H), output of the frozen layers that all models share (drpo.models.trunk); None where there are none."""
    source_scores: Tensor | None = None
    """(B,) float32, raw reward of the whole response that the rollout is reset to; None where nothing is held against
    it (ResetConfig.compares_with_source)."""
    continuations: Continuations | None = None
    """From states within the rollouts, for Monte-Carlo values (drpo.rollout.vine); None for other estimators."""

    @property
    def batch(self) -> PaddedBatch:
        return PaddedBatch(self.queries, self.query_mask, self.responses, self.response_mask)

    def select(self, part: Microbatch) -> tuple[PaddedBatch, Tensor | None]:
        """Return the rows of a micro-batch, and the trunk's output for them, without columns of padding alone."""
        first, end = self.queries.shape[1] - part.query_length, self.queries.shape[1] + part.response_length
        queries = (tokens[part.rows, first:] for tokens in (self.queries, self.query_mask))
        batch = PaddedBatch(*queries, part.responses(self.responses), part.responses(self.response_mask))
        return batch, None if self.trunk is None else self.trunk[part.rows, first:end]

    @property
    def action_mask(self) -> Tensor:
        """(B, R) bool: tokens that the policy sampled, t >= h."""
        positions = torch.arange(self.responses.shape[1], device=self.responses.device)
        return self.response_mask & (positions[None, :] >= self.reset_lengths[:, None])

    @property
    def forced_mask(self) -> Tensor:
        """(B, R) bool: tokens of the forced prefix, t < h."""
        return self.response_mask & self.action_mask.logical_not()

    @property
    def is_reset(self) -> Tensor:
        """(B,) bool: starts from a dataset prefix."""
        return self.reset_lengths > 0

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: response tokens, prefix and stop token included."""
        return self.response_mask.sum(dim=1)

    def response_ids(self) -> list[list[int]]:
        """Return the response tokens of every row, forced prefix and stop token included."""
        rows = zip(self.responses.tolist(), self.lengths.tolist(), strict=True)
        return [response[:length] for response, length in rows]

    def row_lengths(self) -> list[tuple[int, int]]:
        """Return the tokens of every row's query and response."""
        return torch.stack([self.query_mask.sum(dim=1), self.lengths], dim=1).tolist()

    def map(self: Rows, function: Callable[[Tensor], Tensor]) -> Rows:
        """Apply a function to every tensor."""
        fields = self.columns()
        for name, value in fields.items():
            if isinstance(value, Tensor):
                fields[name] = function(value)
            elif isinstance(value, Continuations):
                fields[name] = value.map(function)
        return type(self)(**fields)

    def columns(self) -> dict[str, Any]:
        """Return the fields by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass(frozen=True, eq=False, kw_only=True)
class Trajectory(Rollouts):
    """Rollouts with the measurements of the models at sampling time."""

    logprobs: Tensor
    """(B, R) float32, under the policy that sampled."""
    ref_logprobs: Tensor
    """(B, R) float32, under the reference."""
    entropy: Tensor
    """(B, R) float32, of the policy that sampled, in nats."""
    values: Tensor | None = None
    """(B, R) float32, V before each response token; None without a critic."""
