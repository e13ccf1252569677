"""Turn scores and the KL to the reference policy into per-token rewards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from drpo.data.records import Record
    from drpo.tensors import PaddedBatch


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished response, as a reward function sees it."""

    prompt: str
    "Text that ends where the response begins."
    response: str
    "Text of the response, forced prefix included, without special tokens."
    ended: bool
    "Whether a stop token was sampled."
    query_ids: list[int]
    "Tokens of the prompt alone, unpadded."
    response_ids: list[int]
    "Tokens of the whole response, stop token included when sampled."
    record: Record
    "The row of data that the prompt came from."
    engine_logprobs: list[float] | None = None
    "Log-probabilities of the sampled tokens under a rollout engine that has a copy of the policy; None without one."


@dataclass(frozen=True, eq=False)
class DetailedScores:
    """The scores of completions, and further numbers of each that the loop reports as means, `reward/<name>`.

    It is a sequence of the scores alone to users that know no details.
    """

    scores: Tensor
    "(B,)."
    details: Mapping[str, Tensor] = field(default_factory=dict)
    "(B,) each, by name: the same names in the same order in every call."

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)


class RewardFn(Protocol):
    """Anything that scores completions: one float each, higher is better."""

    def __call__(self, completions: Sequence[Completion]) -> Sequence[float] | Tensor | DetailedScores: ...


@runtime_checkable
class BoundedRewardFn(RewardFn, Protocol):
    """A RewardFn that cannot read texts of any length."""

    @property
    def max_tokens(self) -> int | None:
        """Maximum number of the policy's tokens, prompt and response, that it can read; None for no limit."""
        ...


@runtime_checkable
class IdentifiedRewardFn(RewardFn, Protocol):
    """A RewardFn of which a part is outside the run, and might be replaced while the run is stopped."""

    identity: str | Mapping[str, str] | None
    """The same for the same scores, None for no such part; of a RewardFn that is made of others those of its members,
    by name."""


@runtime_checkable
class WaitingRewardFn(RewardFn, Protocol):
    """A RewardFn that may wait for others."""

    wait_minutes: float
    """The longest wait for one answer."""


@runtime_checkable
class SharingRewardFn(RewardFn, Protocol):
    """A RewardFn that may share frozen weights with policy and critic, and the work of the policy's frozen trunk."""

    shares_trunk: bool
    """Whether it shares the policy's trunk (drpo.models.trunk), and so may be given its output."""

    def share_weights(self, policy: Any, critic: Any | None) -> None:
        """Use the frozen weights of policy and critic in place of its own, where they are equal."""
        ...

    def score_from_trunk(
        self, completions: Sequence[Completion], parts: Sequence[PaddedBatch], trunks: Sequence[Tensor]
    ) -> Tensor | DetailedScores:
        """Score completions, (B,), from the trunk's output (b, Q+R, H) for each batch of `parts`, their tokens."""
        ...


def shape_scores(
    scores: Tensor,
    ended: Tensor,
    lengths: Tensor,
    *,
    missing_stop: Literal["none", "replace", "subtract"],
    missing_stop_penalty: float,
    length_penalty: float,
    clip: float | None,
) -> Tensor:
    """Shape raw scores, of any shape, into the scores that the policy is trained on, in this order.

    1. clip:          score <- min(max(score, -clip), clip)
    2. missing stop:  where `ended` is False, "replace" sets the score to -missing_stop_penalty
                      (Huang et al. 2024, the EOS trick) and "subtract" subtracts the penalty from it
    3. length:        score <- score - length_penalty * lengths

    Penalties are applied after clipping, so they are never clipped. Raises ValueError on another mode, a negative
    penalty (it is subtracted, so it must be positive or 0) or a clip that is not positive.

    Args:
        scores: one per response.
        ended: bool, whether a stop token was sampled.
        lengths: in tokens.
        missing_stop: what happens to the score of a response that did not end.
        missing_stop_penalty, length_penalty: in the unit of the scores; the latter per token.
        clip: bound of |score|; None for no clipping.
    """
    if missing_stop_penalty < 0:
        raise ValueError(
            f"missing_stop_penalty is taken off the score, give it as >= 0, got {missing_stop_penalty}"
        )
    if clip is not None and not clip > 0:
        raise ValueError(f"clip bounds the size of a score, so it must be > 0, got {clip}; None turns it off")
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    match missing_stop:
        case "none":
            pass
        case "replace":
            scores = torch.where(ended, scores, -missing_stop_penalty)
        case "subtract":
            scores = torch.where(ended, scores, scores - missing_stop_penalty)
        case _:
            raise ValueError(f"unknown missing_stop {missing_stop!r}; choose none, replace or subtract")
    return scores - length_penalty * lengths


def token_rewards(
    scores: Tensor, kl: Tensor, kl_coef: float, kl_mask: Tensor, response_mask: Tensor
) -> Tensor:
    """Compute token rewards (B, R): r_t = -kl_coef * kl_t where kl_mask, plus the score at the last real token.

    The last real token is found in `response_mask`, not by looking for padding, so a response that fills the row is
    scored like any other. Raises ValueError when a response has no token that could carry its score.
    Source: Stiennon et al. 2020, section 3.4; Ziegler et al. 2019, eq. 2.

    Args:
        scores: (B,).
        kl: (B, R), in nats.
        kl_coef: score per nat.
        kl_mask: (B, R) bool, the tokens with a penalty.
        response_mask: (B, R) bool, the real tokens.
    """
    empty = response_mask.any(dim=1).logical_not().nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"rows {empty} of response_mask are empty, so no token can carry their scores")
    columns = torch.arange(response_mask.shape[1], device=response_mask.device)
    last = torch.where(response_mask, columns, -1).amax(dim=1, keepdim=True)
    penalty = torch.where(kl_mask, -kl_coef * kl, 0.0)
    return penalty + torch.where(columns == last, scores.to(kl.dtype).unsqueeze(1), 0.0)


class RunningMoments:
    """Mean and variance of every score seen so far, in float64.

    A batch of n scores with mean m and sum of squared deviations s joins the running (N, M, S) by
        d = m - M,   M <- M + d n / (N + n),   S <- S + s + d^2 N n / (N + n),   N <- N + n
    Source: Chan, Golub and LeVeque 1979.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0

    @property
    def var(self) -> float:
        """Population variance S / N of the scores seen so far; nan before the first."""
        return self._squares / self.count if self.count else math.nan

    def update(self, scores: Tensor) -> None:
        """Add a batch of scores of any shape; raise ValueError if one is inf or nan."""
        if not bool(scores.isfinite().all()):
            raise ValueError(f"these scores are not all finite, which the running mean cannot take: {scores}")
        num_new = scores.numel()
        if num_new == 0:
            return
        new = scores.double()
        new_mean = new.mean().item()
        total = self.count + num_new
        shift = new_mean - self.mean
        self._squares += ((new - new_mean) ** 2).sum().item() + shift**2 * self.count * num_new / total
        self.mean += shift * num_new / total
        self.count = total

    def normalise(self, scores: Tensor) -> Tensor:
        """Return (scores - mean) / sqrt(var + 1e-8); raise ValueError before the first update."""
        if self.count == 0:
            raise ValueError("no score seen yet, so there is nothing to normalise by; call update first")
        return ((scores.double() - self.mean) / math.sqrt(self.var + 1e-8)).to(scores.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that `load_state_dict` needs for exact resume."""
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state; raise KeyError when a part is missing."""
        self.count, self.mean, self._squares = state["count"], state["mean"], state["squares"]
