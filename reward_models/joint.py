"""Several reward functions that score as one: an ensemble of reward models, or a weighted sum of named parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drpo.reward_functions import identities_of, reading_trunk, score_in_detail
from drpo.rewards import (
    BoundedRewardFn,
    Completion,
    DetailedScores,
    RewardFn,
    SharingRewardFn,
)
from drpo.tensors import PaddedBatch
from drpo.trainers.reward_parts import EnsembleConfig
from reward_models.ensembles import combine, spread
from reward_models.score import RewardModelScorer

Scored = Mapping[str, DetailedScores]
"The scores of every member, by name."


@dataclass(eq=False)
class JointReward:
    """RewardFn that scores completions once with each member, and joins the scores.

    The members' reward models share frozen weights with policy and critic and among themselves, and the policy's
    frozen trunk. ZeRO-3: every member scores in every call, so that all processes call the same modules.
    """

    members: Mapping[str, RewardFn]
    join: Callable[[Scored], DetailedScores]

    @property
    def identity(self) -> dict[str, str]:
        """The identities of the members that have one, by name."""
        found: dict[str, str] = {}
        for name, member in self.members.items():
            found |= identities_of(member, name)
        return found

    @property
    def max_tokens(self) -> int | None:
        """The smallest number of tokens that a member can read; None for no limit."""
        bounded = [member for member in self.members.values() if isinstance(member, BoundedRewardFn)]
        return min((m.max_tokens for m in bounded if m.max_tokens is not None), default=None)

    @property
    def shares_trunk(self) -> bool:
        """Whether a member shares the policy's trunk; the others compute their own."""
        return any(member.shares_trunk for member in self._sharing())

    def share_weights(self, policy: nn.Module, critic: nn.Module | None) -> None:
        """Use the frozen weights of policy, critic and earlier members in place of equal ones."""
        for member in self._sharing():
            member.share_weights(policy, critic)
        scorers = self.scorers()
        for index, scorer in enumerate(scorers):
            for earlier in scorers[:index]:
                scorer.share_with(earlier)

    def scorers(self) -> list[RewardModelScorer]:
        """Return the reward models among the members and their members."""
        found = []
        for member in self.members.values():
            if isinstance(member, JointReward):
                found += member.scorers()
            elif isinstance(member, RewardModelScorer):
                found.append(member)
        return found

    def score_from_trunk(
        self, completions: Sequence[Completion], parts: Sequence[PaddedBatch], trunks: Sequence[Tensor]
    ) -> DetailedScores:
        """Return the scores of `__call__`, computed from the policy's trunk where a member shares it."""
        members = self.members.items()
        return self._joined({name: reading_trunk(fn, parts, trunks) for name, fn in members}, completions)

    def __call__(self, completions: Sequence[Completion]) -> DetailedScores:
        """Return the joined scores (B,), float32, and those of the members."""
        return self._joined(self.members, completions)

    def _joined(self, members: Mapping[str, RewardFn], completions: Sequence[Completion]) -> DetailedScores:
        return self.join({name: score_in_detail(fn, completions) for name, fn in members.items()})

    def _sharing(self) -> list[SharingRewardFn]:
        return [member for member in self.members.values() if isinstance(member, SharingRewardFn)]


def ensemble(members: Sequence[RewardFn], config: EnsembleConfig) -> JointReward:
    """Make a RewardFn that combines the scores of `members`, with the details `spread` and `member_<i>`."""

    def join(scored: Scored) -> DetailedScores:
        scores = torch.stack([member.scores for member in scored.values()])
        details = {"spread": spread(scores).float(), **{name: m.scores for name, m in scored.items()}}
        return DetailedScores(combine(scores, config.combine, config.coef), details)

    return JointReward({f"member_{i}": member for i, member in enumerate(members)}, join)


def weighted_sum(parts: Mapping[str, RewardFn], weights: Mapping[str, float]) -> JointReward:
    """Make a RewardFn that scores sum_i weight_i * part_i, with the scores of each part as details, unweighted.

    The details of a part follow it, as `<part>/<detail>`.
    """

    def join(scored: Scored) -> DetailedScores:
        details = {}
        for name, part in scored.items():
            details[name] = part.scores
            details |= {f"{name}/{detail}": values for detail, values in part.details.items()}
        total = sum(weights[name] * part.scores.double() for name, part in scored.items())
        return DetailedScores(total.float(), details)

    return JointReward(parts, join)
