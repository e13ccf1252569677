"""Weighted sums and ensembles of reward functions, on functions whose scores are known."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from drpo.data.records import Record
from drpo.reward_functions import identities_of, reading_trunk, score_in_detail
from drpo.rewards import BoundedRewardFn, Completion, DetailedScores, SharingRewardFn
from drpo.trainers.reward_parts import EnsembleConfig
from reward_models.joint import ensemble, weighted_sum

COMPLETIONS = [Completion("p", text, True, [1], [2], Record("p")) for text in ("a", "bb", "cccc")]


@dataclass(eq=False)
class Scores:
    """A RewardFn with given scores that notes its calls, and may take a policy's trunk."""

    scores: list[float]
    shares_trunk: bool = False
    max_tokens: int | None = None
    calls: list[str] = field(default_factory=list)
    owners: list[tuple] = field(default_factory=list)

    def __call__(self, completions) -> list[float]:
        self.calls.append("texts")
        return self.scores

    def share_weights(self, policy, critic) -> None:
        self.owners.append((policy, critic))

    def score_from_trunk(self, completions, parts, trunks) -> Tensor:
        self.calls.append("trunk")
        return torch.tensor(self.scores) + 100


def lengths(completions) -> list[float]:
    return [float(len(completion.response)) for completion in completions]


def listed(scored: DetailedScores) -> tuple[list[float], dict[str, list[float]]]:
    return scored.scores.tolist(), {name: values.tolist() for name, values in scored.details.items()}


def test_the_weighted_sum_by_hand_with_each_part_apart():
    reward = weighted_sum(
        {"model": Scores([1.0, 2.0, 3.0]), "length": lengths}, {"model": 2.0, "length": -0.5}
    )
    scores, details = listed(score_in_detail(reward, COMPLETIONS))
    assert scores == [1.5, 3.0, 4.0]
    assert details == {"model": [1.0, 2.0, 3.0], "length": [1.0, 2.0, 4.0]}


def test_a_part_of_weight_0_is_measured_only():
    reward = weighted_sum({"a": lengths, "b": Scores([9.0, 9.0, 9.0])}, {"a": 1.0, "b": 0.0})
    scores, details = listed(score_in_detail(reward, COMPLETIONS))
    assert scores == [1.0, 2.0, 4.0] and details["b"] == [9.0, 9.0, 9.0]


def test_an_ensemble_gives_members_and_spread():
    members = [Scores([1.0, 0.0, 2.0]), Scores([3.0, 0.0, -2.0])]
    reward = ensemble(members, EnsembleConfig("mean_minus_std", 0.5, ["x", "y"]))
    scores, details = listed(score_in_detail(reward, COMPLETIONS))
    assert scores == [1.5, 0.0, -1.0]
    assert details == {
        "spread": [1.0, 0.0, 2.0], "member_0": [1.0, 0.0, 2.0], "member_1": [3.0, 0.0, -2.0],
    }  # fmt: skip


def test_the_details_of_a_part_follow_it():
    inner = ensemble([Scores([1.0, 2.0, 3.0])], EnsembleConfig(paths=["x"]))
    reward = weighted_sum({"rm": inner, "length": lengths}, {"rm": 1.0, "length": 1.0})
    _, details = listed(score_in_detail(reward, COMPLETIONS))
    assert list(details) == ["rm", "rm/spread", "rm/member_0", "length"]
    assert details["rm/member_0"] == [1.0, 2.0, 3.0]


def test_every_part_scores_once():
    members = [Scores([1.0, 2.0, 3.0]), Scores([1.0, 2.0, 3.0])]
    reward = weighted_sum({"rm": ensemble(members, EnsembleConfig("min", paths=["x", "y"]))}, {"rm": 1.0})
    score_in_detail(reward, COMPLETIONS)
    assert [member.calls for member in members] == [["texts"], ["texts"]]


def test_members_that_share_the_trunk_read_it_and_others_the_texts():
    on_trunk, on_texts = Scores([1.0, 1.0, 1.0], shares_trunk=True), Scores([2.0, 2.0, 2.0])
    reward = weighted_sum({"a": on_trunk, "b": on_texts, "c": lengths}, {"a": 1.0, "b": 1.0, "c": 0.0})
    assert isinstance(reward, SharingRewardFn) and reward.shares_trunk
    scored = score_in_detail(reading_trunk(reward, [], []), COMPLETIONS)
    assert scored.scores.tolist() == [103.0, 103.0, 103.0]
    assert (on_trunk.calls, on_texts.calls) == (["trunk"], ["texts"])
    assert not weighted_sum({"b": on_texts}, {"b": 1.0}).shares_trunk


def test_every_member_is_offered_the_weights_of_policy_and_critic():
    member, policy = Scores([1.0]), object()
    outer = weighted_sum(
        {"rm": ensemble([member], EnsembleConfig(paths=["x"])), "c": lengths}, {"rm": 1.0, "c": 1.0}
    )
    outer.share_weights(policy, None)
    assert member.owners == [(policy, None)]


def test_the_shortest_reach_of_a_member_is_that_of_all():
    members = [Scores([1.0], max_tokens=n) for n in (64, 32, None)]
    reward = weighted_sum(
        {**dict(zip("abc", members, strict=True)), "d": lengths}, dict.fromkeys("abcd", 1.0)
    )
    assert isinstance(reward, BoundedRewardFn) and reward.max_tokens == 32
    assert weighted_sum({"d": lengths}, {"d": 1.0}).max_tokens is None


# --- details of any function ------------------------------------------------------------------------------


def test_a_function_of_the_user_may_give_details():
    def scored(completions) -> DetailedScores:
        return DetailedScores(torch.tensor([1.0, 2.0, 3.0]), {"tone": torch.tensor([0.0, 1.0, 0.0])})

    scores, details = listed(score_in_detail(scored, COMPLETIONS))
    assert (scores, details) == ([1.0, 2.0, 3.0], {"tone": [0.0, 1.0, 0.0]})
    assert [float(score) for score in scored(COMPLETIONS)] == [1.0, 2.0, 3.0]  # to a user without details
    assert score_in_detail(lengths, COMPLETIONS).details == {}


def test_a_detail_of_another_length_is_an_error():
    def scored(completions) -> DetailedScores:
        return DetailedScores(torch.zeros(3), {"tone": torch.zeros(2)})

    with pytest.raises(ValueError, match="for 3 completions as the detail 'tone'"):
        score_in_detail(scored, COMPLETIONS)


def test_members_of_members_keep_their_identities():
    def judged(completions) -> list[float]:
        return [0.0] * len(completions)

    judged.identity = "the judge j"
    inner = weighted_sum({"judge": judged, "length": lengths}, {"judge": 1.0, "length": 1.0})
    outer = weighted_sum({"inner": inner, "length": lengths}, {"inner": 1.0, "length": 1.0})
    assert identities_of(outer, "reward.parts") == {"reward.parts/inner/judge": "the judge j"}
    assert identities_of(judged, "reward") == {"reward": "the judge j"}
    assert identities_of(lengths, "reward") == {}
    assert identities_of(ensemble([lengths], EnsembleConfig(paths=["rm"])), "reward") == {}
