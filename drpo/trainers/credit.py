"""From scored rollouts to advantages and returns: score shaping, KL reward, whitening, GAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from drpo.advantages import gae
from drpo.rewards import AdaptiveKL, FixedKL, RunningMoments, kl_estimate, shape_scores, token_rewards
from drpo.rollout.trajectory import Trajectory
from drpo.tensors import masked_sum, masked_whiten


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
class KLConfig:
    """The KL penalty to the reference, and its guard."""

    coef: float = 0.05
    """Weight of the KL in the reward (the start value when `target_per_token` is set)."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator that enters the reward (Schulman 2020)."""
    target_per_token: float | None = None
    """KL per sampled token, in nats, that an adaptive coefficient steers to, the same notion for PPO and DR-PO; null
    keeps `coef` fixed. From a target per episode: divide by the sampled tokens of an episode (6 nats, 128 tokens:
    0.047)."""
    horizon: float = 10_000
    """Episodes over which the adaptive coefficient reacts; used with `target_per_token`."""
    max_per_token: float | None = None
    """Guard: KL per sampled token, in nats (k3), above which `on_max` happens; null for no guard."""
    on_max: Literal["stop", "rollback"] = "stop"
    """stop: end the run with an error that names the last checkpoint. rollback: go back to the weights of the
    last checkpoint and on with new prompts."""

    RETIRED: ClassVar[dict[str, str]] = {
        "target": "was a KL per episode, which is fewer sampled tokens under resets than without; write "
        "kl.target_per_token = target / sampled tokens of an episode (6 nats, 128 tokens: 0.047)",
        "max": "was a KL per episode, which is fewer sampled tokens under resets than without; write "
        "kl.max_per_token = max / sampled tokens of an episode",
    }

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"kl.coef must be >= 0, got {self.coef}")
        if self.target_per_token is not None and (self.target_per_token <= 0 or self.coef <= 0):
            raise ValueError("kl.target_per_token needs kl.target_per_token > 0 and kl.coef > 0")
        if self.horizon <= 0:
            raise ValueError(f"kl.horizon must be > 0, got {self.horizon}")
        if self.target_per_token is None and self.horizon != KLConfig.horizon:
            raise ValueError(
                f"kl.horizon={self.horizon:g} does nothing without kl.target_per_token; set that, or drop kl.horizon "
                f"({KLConfig.horizon:g})"
            )
        if self.max_per_token is None and self.on_max != "stop":
            raise ValueError(
                "kl.on_max=rollback does nothing without kl.max_per_token; set that, or drop kl.on_max (stop)"
            )
        if self.max_per_token is not None and self.max_per_token <= 0:
            raise ValueError(f"kl.max_per_token must be > 0 or null, got {self.max_per_token}")

    def controller(self) -> FixedKL | AdaptiveKL:
        if self.target_per_token is None:
            return FixedKL(self.coef)
        return AdaptiveKL(self.coef, self.target_per_token, self.horizon)


@dataclass(frozen=True)
class AdvantageConfig:
    """GAE and whitening."""

    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Lambda of GAE."""
    whiten: bool = True
    """Scale advantages to mean 0 and variance 1 over the tokens of the whole batch, all processes together."""
    whiten_rewards: bool = False
    """Scale per-token rewards to variance 1 (the mean stays) before GAE, as the released code does."""

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"advantage.{name} must lie in [0, 1], got {getattr(self, name)}")


class Credit(NamedTuple):
    """What every token of a batch of rollouts is trained on. Rows first; (B, R) but for the scores."""

    scores: Tensor
    """(B,) shaped scores."""
    kl: Tensor
    """KL estimate of each response token that carries KL reward, 0 elsewhere."""
    advantages: Tensor
    returns: Tensor
    policy_mask: Tensor
    """Tokens with policy loss and entropy bonus."""
    value_mask: Tensor
    """Tokens with value loss, KL reward, and a place in the whitening statistics."""


def assign_credit(
    trajectory: Trajectory,
    shaping: ShapingConfig,
    kl: KLConfig,
    kl_coef: float,
    advantage: AdvantageConfig,
    masking: str,
    running: RunningMoments,
) -> Credit:
    """Advantages and returns of a whole batch (the rows of all processes).

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
    advantages, returns = gae(rewards, trajectory.values, value_mask, advantage.gamma, advantage.lam)
    if advantage.whiten:
        advantages = masked_whiten(advantages, value_mask)
    return Credit(scores, token_kl, advantages, returns, policy_mask, value_mask)


def episode_kl(trajectory: Trajectory, estimator: str) -> Tensor:
    """(B,) KL to the reference summed over each episode's policy tokens, in nats."""
    kl = kl_estimate(trajectory.logprobs, trajectory.ref_logprobs, estimator)
    return masked_sum(kl, trajectory.action_mask, dim=1)


def kl_per_token(trajectory: Trajectory, estimator: str) -> Tensor:
    """Mean KL to the reference over all tokens that the policy sampled, in nats: a scalar.

        sum over rows and sampled tokens of KL_t / number of those tokens

    Forced tokens are in neither sum, so the same policy has the same KL with and without resets. The sum over
    an episode has not: a reset leaves fewer tokens to sum over.
    """
    return episode_kl(trajectory, estimator).sum() / trajectory.action_mask.sum()
