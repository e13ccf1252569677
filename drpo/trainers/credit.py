"""Assign credit: from scored rollouts to advantages, by score shaping, KL reward, an estimator and whitening."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from drpo.advantages import gae, grpo, length_adaptive_lam, rewards_to_go, rloo, vine
from drpo.config import Section, key, refuse, refuse_changed, setting
from drpo.kl import AdaptiveKL, Estimator, FixedKL, kl_estimate
from drpo.rewards import RunningMoments, shape_scores, token_rewards
from drpo.rollout.trajectory import Trajectory
from drpo.tensors import masked_whiten


@dataclass(frozen=True)
class ShapingConfig(Section):
    """Steps that shape a raw reward before the policy is trained on it, in the order of the fields."""

    normalise: Literal["none", "running", "batch"] = "none"
    """running: minus the mean and over the standard deviation of all scores so far; batch: of this step's."""
    clip: float | None = setting(None, gt=0)
    """Scores are held within [-clip, clip]; null for no limit."""
    missing_stop: Literal["none", "replace", "subtract"] = "replace"
    """A response that never ended: its score is replaced by -missing_stop_penalty, or the penalty taken off."""
    missing_stop_penalty: float = setting(1.0, ge=0)
    """Size of that penalty, >= 0."""
    length_penalty: float = 0.0
    """Taken off the score for each response token."""

    def check(self) -> None:
        if self.missing_stop == "none":
            rule = f"does nothing with {key('missing_stop')}=none; set that to replace or subtract, or drop the penalty"
            refuse_changed(self, ["missing_stop_penalty"], rule)


@dataclass(frozen=True)
class KLConfig(Section):
    """The KL penalty to the reference, and its guard."""

    coef: float = setting(0.05, ge=0)
    """Weight of the KL in the reward (the start value when `target_per_token` is set)."""
    estimator: Estimator = "k1"
    """Estimator that enters the reward (Schulman 2020)."""
    target_per_token: float | None = setting(None, gt=0)
    """KL per sampled token, in nats, that an adaptive coefficient steers to, defined identically for PPO and DR-PO;
    null keeps `coef` fixed. From a target per episode: divide by the sampled tokens of an episode (6 nats, 128 tokens:
    0.047)."""
    horizon: float = setting(10_000, gt=0)
    """Episodes over which the adaptive coefficient reacts; used with `target_per_token`."""
    max_per_token: float | None = setting(None, gt=0)
    """Guard: KL per sampled token, in nats (k3), above which `on_max` happens; null for no guard."""
    on_max: Literal["stop", "rollback"] = "stop"
    """stop: end the run with an error that names the last checkpoint. rollback: go back to the weights of the
    last checkpoint and on with new prompts."""
    offload_reference: bool = False
    """Keep the reference policy in the host's memory between its phases."""

    RETIRED: ClassVar[dict[str, str]] = {
        "target": "was a KL per episode, which is fewer sampled tokens under resets than without; write "
        "kl.target_per_token = target / sampled tokens of an episode (6 nats, 128 tokens: 0.047)",
        "max": "was a KL per episode, which is fewer sampled tokens under resets than without; write "
        "kl.max_per_token = max / sampled tokens of an episode",
    }

    def check(self) -> None:
        if self.target_per_token is None:
            rule = f"does nothing without {key('target_per_token')}; set that, or drop {key('horizon')}"
            refuse_changed(self, ["horizon"], rule)
        else:
            refuse(self.coef == 0, "coef", f"must be > 0 where {key('target_per_token')} adapts it, got 0")
        if self.max_per_token is None:
            rule = f"does nothing without {key('max_per_token')}; set that, or drop {key('on_max')}"
            refuse_changed(self, ["on_max"], rule)

    def controller(self) -> FixedKL | AdaptiveKL:
        if self.target_per_token is None:
            return FixedKL(self.coef)
        return AdaptiveKL(self.coef, self.target_per_token, self.horizon)


LAMBDAS = ("lam", "value_lam", "length_adaptive_alpha")


@dataclass(frozen=True)
class AdvantageConfig(Section):
    """Estimator that turns the reward of a response into advantages of its tokens."""

    estimator: Literal["gae", "rloo", "grpo", "reinforce_pp", "vine"] = "gae"
    """gae: generalised advantage estimation over a critic's values. Without a critic: rloo: the return less the mean
    return of the other rollouts of the prompt (rollout.rollouts_per_prompt). grpo: the return less the mean of all of
    them, over their standard deviation. reinforce_pp: the rewards to go, whitened (REINFORCE++).
    vine: differences of Monte-Carlo values at states within the response (section vine)."""
    gamma: float = setting(1.0, ge=0, le=1)
    """Discount per token; for gae and reinforce_pp."""
    lam: float = setting(0.95, ge=0, le=1)
    """Lambda of GAE; for gae."""
    value_lam: float | None = setting(None, ge=0, le=1)
    """Lambda of the returns that the critic learns; null takes lam. 1: the rewards to go, without bias (VC-PPO)."""
    length_adaptive_alpha: float | None = setting(None, gt=0)
    """Lambda of the policy's advantages is 1 - 1/(alpha l), at least 0, in place of lam, where l counts the tokens of
    the episode: the sampled ones, with reset.masking=release the forced ones too (VAPO: 0.05). The critic's stays
    value_lam, or lam."""
    group_std: bool = True
    """Divide by the standard deviation of the prompt's returns; for grpo. false: Dr. GRPO."""
    whiten: bool = True
    """Scale advantages to mean 0 and variance 1 over the tokens of the whole batch, all processes together."""
    whiten_rewards: bool = False
    """Scale per-token rewards to variance 1 (the mean stays) before GAE, as the released code does."""

    def check(self) -> None:
        rule = f"does not apply to {key('estimator')}={self.estimator}; drop it"
        if not self.needs_critic:
            refuse_changed(self, LAMBDAS, rule)
        elif self.gamma == 0:
            refuse_changed(
                self, LAMBDAS, f"does nothing with {key('gamma')}=0: advantages are of one step; drop it"
            )
        if self.estimator not in ("gae", "reinforce_pp"):
            refuse_changed(self, ("gamma",), rule)
        if self.estimator != "grpo":
            refuse_changed(self, ("group_std",), rule)
        if self.estimator != "gae":
            refuse_changed(self, ("whiten_rewards",), f"{rule}: without a critic it would pay for length")
        refuse(
            self.estimator == "reinforce_pp" and not self.whiten,
            "whiten",
            f"must be true for {key('estimator')}=reinforce_pp: the mean of the whole batch is its only baseline",
        )
        if self.value_lam is not None and self.length_adaptive_alpha is not None:
            rule = f"does nothing beside {key('length_adaptive_alpha')} and {key('value_lam')}; drop one of the three"
            refuse_changed(self, ("lam",), rule)

    @property
    def needs_critic(self) -> bool:
        """Whether the estimator reads a critic's values."""
        return self.estimator == "gae"

    @property
    def compares_group(self) -> bool:
        """Whether the baseline of a rollout comes from the other rollouts of its prompt."""
        return self.estimator in ("rloo", "grpo")


METHODS = {"gae": "PPO", "rloo": "RLOO", "grpo": "GRPO", "reinforce_pp": "REINFORCE++", "vine": "VinePPO"}
"Names of the algorithms by their estimators."


def method_name(estimator: str, has_resets: bool) -> str:
    """Return what an online run is called: PPO, which is DR-PO from resets; RLOO, RLOO with resets; ..."""
    if has_resets and estimator == "gae":
        return "DR-PO"
    return METHODS.get(estimator, str(estimator)) + " with resets" * has_resets


class Credit(NamedTuple):
    """Training signals of every token of a batch of rollouts, (B, R) except for the scores."""

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
    continuation_scores: Tensor | None = None
    """(B, S, K) shaped scores of the continuations; None for other estimators than vine."""


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
    """Compute advantages and returns of a whole batch (the rows of all processes).

    With masking="paper" the episode begins at the reset: forced tokens have no KL reward, no value target and
    no part in the statistics (arXiv 2404.08495, Algorithm 1). "release" keeps them in all three, as the
    released code does.

    Args:
        trajectory: B rollouts, (B, R) per token.
        shaping: how scores (B,) are shaped.
        kl: estimator of the KL reward.
        kl_coef: its current weight.
        advantage: estimator and whitening.
        masking: paper or release.
        running: moments of all scores, updated when shaping.normalise="running".
        group_size: rollouts per prompt, adjacent rows.
    """
    moments = None
    if shaping.normalise != "none":
        moments = running if shaping.normalise == "running" else RunningMoments()
        moments.update(trajectory.scores)
    scores = _shaped(trajectory.scores, trajectory.ended, trajectory.lengths, shaping, moments)
    policy_mask = trajectory.action_mask
    value_mask = policy_mask if masking == "paper" else trajectory.response_mask
    token_kl = kl_estimate(trajectory.logprobs, trajectory.ref_logprobs, kl.estimator)
    token_kl = torch.where(value_mask, token_kl, 0.0)
    rewards = token_rewards(scores, token_kl, kl_coef, value_mask, trajectory.response_mask)
    if advantage.whiten_rewards:
        rewards = masked_whiten(rewards, value_mask, shift_mean=False)
    returns = continuation_scores = None
    match advantage.estimator:
        case "gae":
            advantages, returns = _over_critic(rewards, trajectory.values, value_mask, advantage)
        case "rloo":
            advantages = rloo(rewards, value_mask, group_size)
        case "grpo":
            advantages = grpo(rewards, value_mask, group_size, advantage.group_std)
        case "reinforce_pp":
            advantages = rewards_to_go(rewards, value_mask, advantage.gamma)
        case "vine":
            states, width = trajectory.continuations, rewards.shape[1]
            continuation_scores = _shaped(states.scores, states.ended, states.lengths, shaping, moments)
            values = states.by_token(continuation_scores.mean(dim=2), width)
            advantages = vine(rewards, values, value_mask, states.by_token(states.mask, width))
    if advantage.whiten:
        advantages = masked_whiten(advantages, value_mask)
    return Credit(scores, token_kl, advantages, returns, policy_mask, value_mask, continuation_scores)


def _over_critic(
    rewards: Tensor, values: Tensor, mask: Tensor, config: AdvantageConfig
) -> tuple[Tensor, Tensor]:
    """Compute advantages with the policy's lambda and returns with the critic's, all (B, R)."""
    episodes, lam = (rewards, values, mask, config.gamma), config.lam
    if (alpha := config.length_adaptive_alpha) is not None:
        lam = length_adaptive_lam(mask, alpha)
    advantages, returns = gae(*episodes, lam)
    value_lam = config.lam if config.value_lam is None else config.value_lam
    if alpha is not None or value_lam != lam:
        returns = gae(*episodes, value_lam)[1]
    return advantages, returns


def _shaped(
    scores: Tensor, ended: Tensor, lengths: Tensor, shaping: ShapingConfig, moments: RunningMoments | None
) -> Tensor:
    return shape_scores(
        scores if moments is None else moments.normalise(scores),
        ended,
        lengths,
        missing_stop=shaping.missing_stop,
        missing_stop_penalty=shaping.missing_stop_penalty,
        length_penalty=shaping.length_penalty,
        clip=shaping.clip,
    )
