"""Assign credit: from scored rollouts to advantages, by score shaping, KL reward, an estimator and whitening."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from drpo.advantages import gae, rloo
from drpo.kl import KLConfig, kl_estimate
from drpo.rewards import RunningMoments, shape_scores, token_rewards
from drpo.rollout.trajectory import Trajectory
from drpo.tensors import masked_whiten


@dataclass(frozen=True)
class ShapingConfig:
    """What happens to a raw reward before the policy is trained on it, in the order of the fields."""

    normalise: Literal["none", "running", "batch"] = "none"
    """running: minus the mean and over the standard deviation of all scores so far; batch: of this step's."""
    clip: float | None = None
    """Scores are held within [-clip, clip]; null for no limit."""
    missing_stop: Literal["none", "replace", "subtract"] = "replace"
    """A response that never ended: its score is replaced by -missing_stop_penalty, or the penalty taken off."""
    missing_stop_penalty: float = 1.0
    """Size of that penalty, >= 0."""
    length_penalty: float = 0.0
    """Taken off the score for each response token."""

    def __post_init__(self) -> None:
        if self.missing_stop_penalty < 0:
            raise ValueError(
                f"reward.shaping.missing_stop_penalty must be >= 0, got {self.missing_stop_penalty}"
            )
        if self.missing_stop == "none" and self.missing_stop_penalty != ShapingConfig.missing_stop_penalty:
            raise ValueError(
                f"reward.shaping.missing_stop_penalty={self.missing_stop_penalty:g} does nothing with "
                "reward.shaping.missing_stop=none; set that to replace or subtract, or drop the penalty (1)"
            )
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"reward.shaping.clip must be > 0 or null, got {self.clip}")


@dataclass(frozen=True)
class AdvantageConfig:
    """How the reward of a response is turned into the advantages of its tokens."""

    estimator: Literal["gae", "rloo"] = "gae"
    """gae: generalised advantage estimation over a critic's values. rloo: the return less the mean return of the other
    rollouts of the prompt (rollout.rollouts_per_prompt), without a critic."""
    gamma: float = 1.0
    """Discount per token; for gae."""
    lam: float = 0.95
    """Lambda of GAE; for gae."""
    whiten: bool = True
    """Scale advantages to mean 0 and variance 1 over the tokens of the whole batch, all processes together."""
    whiten_rewards: bool = False
    """Scale per-token rewards to variance 1 (the mean stays) before GAE, as the released code does."""

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"advantage.{name} must lie in [0, 1], got {getattr(self, name)}")
            if not self.needs_critic and getattr(self, name) != getattr(AdvantageConfig, name):
                raise ValueError(f"advantage.{name} does not apply to advantage.estimator={self.estimator}")

    @property
    def needs_critic(self) -> bool:
        """Whether the estimator reads a critic's values."""
        return self.estimator == "gae"


class Credit(NamedTuple):
    """What every token of a batch of rollouts is trained on. Rows first; (B, R) but for the scores."""

    scores: Tensor
    """(B,) shaped scores."""
    kl: Tensor
    """KL estimate of each response token that carries KL reward, 0 elsewhere."""
    advantages: Tensor
    returns: Tensor | None
    """What the critic learns; None without a critic."""
    policy_mask: Tensor
    """Tokens with policy loss and entropy bonus."""
    value_mask: Tensor
    """Tokens with KL reward, value loss, and a place in the whitening statistics."""


def assign_credit(
    trajectory: Trajectory,
    shaping: ShapingConfig,
    kl: KLConfig,
    kl_coef: float,
    advantage: AdvantageConfig,
    masking: str,
    running: RunningMoments,
    group_size: int = 1,
) -> Credit:
    """Advantages and returns of a whole batch (the rows of all processes), `group_size` rollouts of a prompt each.

    With masking="paper" the episode begins at the reset: forced tokens have no KL reward, no value target and
    no part in the statistics (arXiv 2404.08495, Algorithm 1). "release" keeps them in all three, as the
    released code does. `running` is updated when shaping.normalise="running".
    """
    raw = trajectory.scores
    match shaping.normalise:
        case "running":
            running.update(raw)
            raw = running.normalise(raw)
        case "batch":
            batch = RunningMoments()
            batch.update(raw)
            raw = batch.normalise(raw)
    scores = shape_scores(
        raw,
        trajectory.ended,
        trajectory.lengths,
        missing_stop=shaping.missing_stop,
        missing_stop_penalty=shaping.missing_stop_penalty,
        length_penalty=shaping.length_penalty,
        clip=shaping.clip,
    )
    policy_mask = trajectory.action_mask
    value_mask = policy_mask if masking == "paper" else trajectory.response_mask
    token_kl = kl_estimate(trajectory.logprobs, trajectory.ref_logprobs, kl.estimator)
    token_kl = torch.where(value_mask, token_kl, 0.0)
    rewards = token_rewards(scores, token_kl, kl_coef, value_mask, trajectory.response_mask)
    if advantage.whiten_rewards:
        rewards = masked_whiten(rewards, value_mask, shift_mean=False)
    returns = None
    match advantage.estimator:
        case "gae":
            advantages, returns = gae(rewards, trajectory.values, value_mask, advantage.gamma, advantage.lam)
        case "rloo":
            advantages = rloo(rewards, value_mask, group_size)
    if advantage.whiten:
        advantages = masked_whiten(advantages, value_mask)
    return Credit(scores, token_kl, advantages, returns, policy_mask, value_mask)
