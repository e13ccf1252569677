"""Credit assignment: what each token is trained on, with forced tokens left out (paper) or kept in (release)."""

from __future__ import annotations

import dataclasses
import math
import typing

import numpy as np
import pytest
import torch
from hand_rollouts import hand_trajectory
from torch import Tensor

from drpo.kl import AdaptiveKL, FixedKL, kl_per_token, sequence_kl
from drpo.rewards import RunningMoments
from drpo.rollout.trajectory import Trajectory
from drpo.trainers.credit import (
    AdvantageConfig,
    Credit,
    KLConfig,
    ShapingConfig,
    assign_credit,
    method_name,
)

PLAIN = ShapingConfig(missing_stop="none")
RAW = AdvantageConfig(gamma=1.0, lam=0.5, whiten=False)


def credit_of(
    trajectory: Trajectory,
    masking: str = "paper",
    *,
    shaping: ShapingConfig = PLAIN,
    kl: KLConfig | None = None,
    kl_coef: float = 0.1,
    advantage: AdvantageConfig = RAW,
    running: RunningMoments | None = None,
    group_size: int = 1,
) -> Credit:
    running = running or RunningMoments()
    return assign_credit(
        trajectory, shaping, kl or KLConfig(), kl_coef, advantage, masking, running, group_size
    )


def close(tensor: Tensor, expected: list, atol: float = 1e-5) -> bool:
    return torch.allclose(tensor, torch.tensor(expected, dtype=tensor.dtype), rtol=0, atol=atol)


@pytest.fixture
def trajectory() -> Trajectory:
    """Two forced and two sampled tokens; and three sampled ones. Width 5."""
    return hand_trajectory(
        lengths=[4, 3],
        forced=[2, 0],
        width=5,
        scores=[3.0, -1.0],
        log_ratios=[[9.0, -7.0, 1.0, 2.0], [0.0, 1.0, -1.0]],
        values=[[10.0, 20.0, 1.0, 2.0], [0.5, 0.0, 1.0]],
        source_lengths=[6, 0],
    )


# --- paper and release masking, worked by hand ------------------------------------------------------------


def test_paper_masking_begins_the_episode_at_the_reset(trajectory):
    credit = credit_of(trajectory, "paper")
    # Row 0: rewards of t=2, 3 are -0.1*1 and -0.1*2 + 3.
    #   delta_3 = 2.8 - 2 = 0.8;  delta_2 = -0.1 + 2 - 1 = 0.9;  A_3 = 0.8;  A_2 = 0.9 + 0.5*0.8 = 1.3
    # Row 1: rewards 0, -0.1, 0.1 - 1 = -0.9.
    #   delta_2 = -0.9 - 1 = -1.9;  delta_1 = -0.1 + 1 - 0 = 0.9;  delta_0 = 0 + 0 - 0.5 = -0.5
    #   A_2 = -1.9;  A_1 = 0.9 - 0.95 = -0.05;  A_0 = -0.5 - 0.025 = -0.525
    assert close(credit.advantages, [[0, 0, 1.3, 0.8, 0], [-0.525, -0.05, -1.9, 0, 0]])
    assert close(credit.returns, [[0, 0, 2.3, 2.8, 0], [-0.025, -0.05, -0.9, 0, 0]])
    assert close(credit.kl, [[0, 0, 1, 2, 0], [0, 1, -1, 0, 0]])
    assert credit.policy_mask.tolist() == [[False, False, True, True, False], [True] * 3 + [False] * 2]
    assert torch.equal(credit.value_mask, credit.policy_mask)


def test_release_masking_keeps_forced_tokens_in_kl_and_value_but_not_in_the_policy_loss(trajectory):
    credit = credit_of(trajectory, "release")
    # Row 0 as above from t=2 on; the rewards of t=0, 1 are -0.9 and 0.7.
    #   delta_1 = 0.7 + 1 - 20 = -18.3;  A_1 = -18.3 + 0.5*1.3 = -17.65
    #   delta_0 = -0.9 + 20 - 10 = 9.1;  A_0 = 9.1 - 8.825 = 0.275
    assert close(credit.advantages[0], [0.275, -17.65, 1.3, 0.8, 0])
    assert close(credit.returns[0], [10.275, 2.35, 2.3, 2.8, 0])
    assert close(credit.kl[0], [9, -7, 1, 2, 0])
    assert credit.value_mask.tolist() == [[True] * 4 + [False], [True] * 3 + [False] * 2]
    assert credit.policy_mask.tolist() == [[False, False, True, True, False], [True] * 3 + [False] * 2]


def test_without_forced_tokens_both_maskings_are_ppo(trajectory):
    ppo = dataclasses.replace(trajectory, reset_lengths=torch.zeros(2, dtype=torch.long))
    whitened = AdvantageConfig(whiten_rewards=True)
    paper = credit_of(ppo, "paper", advantage=whitened)
    release = credit_of(ppo, "release", advantage=whitened)
    assert all(p is r or torch.equal(p, r) for p, r in zip(paper, release, strict=True))


# Of commit 03b4e1c, before there were other estimators.
FIRST = {
    ("paper", "advantages"): [[0, 0, 1.6100687980651855, 0.6529998779296875, 0],
                              [-0.8699564933776855, -0.7490910291671753, -2.2669999599456787, 0, 0]],
    ("paper", "returns"): [[0, 0, 2.710068702697754, 2.9529998302459717, 0],
                           [-0.36995649337768555, -0.44909101724624634, -0.5669999122619629, 0, 0]],
    ("paper", "whitened"): [[0, 0, 1.4461033344268799, 0.7307232022285461, 0],
                            [-0.407640665769577, -0.31729739904403687, -1.4518884420394897, 0, 0]],
    ("release", "advantages"): [[-6.1036577224731445, -17.037410736083984, 1.6100687980651855, 0.6529998779296875, 0],
                                [-0.8699564933776855, -0.7490910291671753, -2.2669999599456787, 0, 0]],
    ("release", "returns"): [[3.8963422775268555, 2.9625892639160156, 2.710068702697754, 2.9529998302459717, 0],
                             [-0.36995649337768555, -0.44909101724624634, -0.5669999122619629, 0, 0]],
    ("release", "whitened"): [[-0.42988321185112, -2.2616653442382812, 0.8624329566955566, 0.7020907998085022, 0],
                              [0.44694289565086365, 0.46719205379486084, 0.21288976073265076, 0, 0]],
}  # fmt: skip


@pytest.mark.parametrize("masking", ["paper", "release"])
def test_gae_gives_what_it_gave_before_there_were_other_estimators(masking):
    uneven = hand_trajectory(
        lengths=[4, 3],
        forced=[2, 0],
        width=5,
        scores=[3.1, -0.7],
        log_ratios=[[9.0, -7.0, 1.3, 2.1], [0.1, 1.7, -1.9]],
        values=[[10.0, 20.0, 1.1, 2.3], [0.5, 0.3, 1.7]],
        source_lengths=[6, 0],
    )
    config = AdvantageConfig(gamma=0.97, lam=0.9, whiten=False)
    plain = credit_of(uneven, masking, kl_coef=0.07, advantage=config)
    assert close(plain.advantages, FIRST[masking, "advantages"], atol=2e-6)
    assert close(plain.returns, FIRST[masking, "returns"], atol=2e-6)
    whitened = credit_of(uneven, masking, kl_coef=0.07, advantage=dataclasses.replace(config, whiten=True))
    assert close(whitened.advantages, FIRST[masking, "whitened"], atol=1e-6)
    assert torch.equal(whitened.returns, plain.returns)


# --- the other estimators, on the rewards of the first test: 0, 0, -0.1, 2.8 and 0, -0.1, -0.9 -----------


def test_returns_of_the_critic_have_their_own_lambda(trajectory):
    decoupled = credit_of(trajectory, advantage=dataclasses.replace(RAW, value_lam=1.0))
    # lambda 1: the returns are the rewards to go: 2.7, 2.8 and -1, -1, -0.9. The advantages stay those of lambda 0.5.
    assert close(decoupled.returns, [[0, 0, 2.7, 2.8, 0], [-1, -1, -0.9, 0, 0]])
    assert torch.equal(decoupled.advantages, credit_of(trajectory).advantages)
    same = credit_of(trajectory, advantage=dataclasses.replace(RAW, value_lam=0.5))
    expected = credit_of(trajectory)
    assert all(torch.equal(x, y) for x, y in zip(same[:6], expected[:6], strict=True))


def test_lambda_of_the_policy_follows_sampled_tokens(trajectory):
    # alpha 1: l = 2 gives lambda 1 - 1/2 = 1/2, l = 3 gives 2/3.
    #   Row 0 as in the first test. Row 1: A_2 = -1.9;  A_1 = 0.9 - 2/3 1.9 = -0.36667;  A_0 = -0.5 - 0.24444 = -0.74444
    adaptive = dataclasses.replace(RAW, length_adaptive_alpha=1.0)
    credit = credit_of(trajectory, advantage=adaptive)
    assert close(credit.advantages, [[0, 0, 1.3, 0.8, 0], [-0.744444, -0.366667, -1.9, 0, 0]])
    assert torch.equal(credit.returns, credit_of(trajectory).returns)
    both = credit_of(
        trajectory, advantage=AdvantageConfig(value_lam=1.0, length_adaptive_alpha=1.0, whiten=False)
    )
    assert torch.equal(both.advantages, credit.advantages)
    assert close(both.returns, [[0, 0, 2.7, 2.8, 0], [-1, -1, -0.9, 0, 0]])


def test_group_estimators_compare_returns_with_kl_penalties(trajectory):
    # Returns 2.7 and -1: mean 0.85, deviations 1.85 and -1.85, sample variance 2 * 1.85^2, std 1.85 sqrt 2.
    for group_std, size in ((True, 1 / 2**0.5), (False, 1.85)):
        config = AdvantageConfig(estimator="grpo", group_std=group_std, whiten=False)
        credit = credit_of(trajectory, advantage=config, group_size=2)
        assert credit.returns is None
        assert close(credit.advantages, [[0, 0, size, size, 0], [-size, -size, -size, 0, 0]])


def test_rloo_compares_a_return_with_those_of_the_others(trajectory):
    # Returns 2.7 and -1, each the other's baseline.
    credit = credit_of(trajectory, advantage=AdvantageConfig(estimator="rloo", whiten=False), group_size=2)
    assert credit.returns is None
    assert close(credit.advantages, [[0, 0, 3.7, 3.7, 0], [-3.7, -3.7, -3.7, 0, 0]])


def test_reinforce_pp_whitens_rewards_to_go(trajectory):
    credit = credit_of(trajectory, advantage=AdvantageConfig(estimator="reinforce_pp"))
    to_go = np.array([2.7, 2.8, -1, -1, -0.9])
    expected = (to_go - to_go.mean()) / to_go.std()
    assert np.allclose(credit.advantages[credit.policy_mask].numpy(), expected, atol=1e-5)
    assert credit.returns is None


def test_methods_are_called_by_their_estimators():
    assert (method_name("gae", has_resets=False), method_name("gae", has_resets=True)) == ("PPO", "DR-PO")
    assert method_name("vine", has_resets=False) == "VinePPO"
    assert method_name("reinforce_pp", has_resets=True) == "REINFORCE++ with resets"
    estimators = typing.get_args(typing.get_type_hints(AdvantageConfig)["estimator"])
    assert len({method_name(each, has_resets) for each in estimators for has_resets in (True, False)}) == 10


# --- what forced tokens and padding can reach -------------------------------------------------------------


def changed(trajectory: Trajectory, where: Tensor, value: float) -> Trajectory:
    """log-probs, values and entropy replaced by `value` where `where` is True."""
    names = ("logprobs", "ref_logprobs", "values", "entropy")
    fields = {name: getattr(trajectory, name) for name in names}
    fields["logprobs"] = fields["logprobs"].masked_fill(where, value)
    fields["values"] = fields["values"].masked_fill(where, 3 * value)
    fields["entropy"] = fields["entropy"].masked_fill(where, value)
    return dataclasses.replace(trajectory, **fields)


EVERYTHING = AdvantageConfig(lam=0.9, whiten=True, whiten_rewards=True)


@pytest.mark.parametrize("value", [-33.0, math.inf, math.nan])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_under_paper_masking_nothing_measured_on_forced_tokens_or_padding_has_an_effect(
    trajectory, value, estimator
):
    kl = KLConfig(estimator=estimator)
    other = changed(trajectory, trajectory.action_mask.logical_not(), value)
    before = credit_of(trajectory, kl=kl, advantage=EVERYTHING)
    after = credit_of(other, kl=kl, advantage=EVERYTHING)
    assert all(x is y or torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("value", [-33.0, math.inf, math.nan])
def test_under_release_masking_padding_has_no_effect(trajectory, value):
    """The released code trains on what follows the stop token; that defect is not kept."""
    other = changed(trajectory, trajectory.response_mask.logical_not(), value)
    before = credit_of(trajectory, "release", advantage=EVERYTHING)
    after = credit_of(other, "release", advantage=EVERYTHING)
    assert all(x is y or torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("masking", ["paper", "release"])
def test_the_kl_of_forced_tokens_does_not_touch_later_advantages_before_whitening(trajectory, masking):
    """GAE runs backwards, so A_t for t >= h only sees what comes after it."""
    forced = torch.arange(5)[None, :] < trajectory.reset_lengths[:, None]
    other = changed(trajectory, forced, 5.0)
    before, after = credit_of(trajectory, masking), credit_of(other, masking)
    mask = trajectory.action_mask
    assert torch.equal(before.advantages[mask], after.advantages[mask])
    assert torch.equal(before.returns[mask], after.returns[mask])


def test_under_release_masking_forced_tokens_reach_the_others_through_whitening(trajectory):
    """This leak of the released code is what reset.masking=paper closes."""
    forced = torch.arange(5)[None, :] < trajectory.reset_lengths[:, None]
    other = changed(trajectory, forced, 5.0)
    before = credit_of(trajectory, "release", advantage=EVERYTHING)
    after = credit_of(other, "release", advantage=EVERYTHING)
    mask = trajectory.action_mask
    assert not torch.allclose(before.advantages[mask], after.advantages[mask])


@pytest.mark.parametrize("masking", ["paper", "release"])
def test_advantages_are_whitened_over_the_counted_tokens(trajectory, masking):
    raw = credit_of(trajectory, masking)
    white = credit_of(trajectory, masking, advantage=dataclasses.replace(RAW, whiten=True))
    counted = raw.value_mask.numpy()
    tokens = raw.advantages.numpy().astype(np.float64)[counted]
    expected = (tokens - tokens.mean()) / np.sqrt(tokens.var() + 1e-8)
    assert np.allclose(white.advantages.numpy()[counted], expected, atol=1e-5)
    assert not white.advantages.numpy()[~counted].any()
    assert torch.equal(white.returns, raw.returns)  # the critic's targets stay in reward units


def test_rewards_are_whitened_over_the_counted_tokens_and_keep_their_mean(trajectory):
    one_step = AdvantageConfig(gamma=0.0, whiten=False, whiten_rewards=True)  # returns = rewards
    credit = credit_of(trajectory, advantage=one_step)
    rewards = np.array([-0.1, 2.8, 0.0, -0.1, -0.9])  # of the five policy tokens, from the first test
    expected = (rewards - rewards.mean()) / np.sqrt(rewards.var() + 1e-8) + rewards.mean()
    assert np.allclose(credit.returns[credit.value_mask].numpy(), expected, atol=1e-5)


# --- where the score goes ---------------------------------------------------------------------------------

ONE_STEP = AdvantageConfig(gamma=0.0, whiten=False)


def rewards_of(trajectory: Trajectory, **kwargs) -> Tensor:
    """With gamma = 0 the return of a token is its own reward."""
    return credit_of(trajectory, advantage=ONE_STEP, **kwargs).returns


def test_the_score_stands_on_the_last_token_also_of_a_full_row_without_stop():
    full = hand_trajectory(lengths=[4, 2], forced=[0, 1], width=4, scores=[5.0, 6.0], ended=[False, True])
    assert close(rewards_of(full), [[0, 0, 0, 5], [0, 6, 0, 0]])


def test_a_stop_token_at_the_last_index_is_a_stop():
    """The released code looks for padding after the stop token, finds none and gives -1."""
    full = hand_trajectory(lengths=[4], forced=[2], width=4, scores=[5.0], ended=[True])
    assert close(rewards_of(full, shaping=ShapingConfig()), [[0, 0, 0, 5]])


def test_missing_stop_replaces_the_score_or_is_taken_off():
    pair = hand_trajectory(lengths=[3, 2], forced=[0, 0], width=3, scores=[5.0, 6.0], ended=[False, True])
    replace = ShapingConfig(missing_stop="replace", missing_stop_penalty=1.5)
    subtract = ShapingConfig(missing_stop="subtract", missing_stop_penalty=1.5)
    assert close(rewards_of(pair, shaping=replace), [[0, 0, -1.5], [0, 6, 0]])
    assert close(rewards_of(pair, shaping=subtract), [[0, 0, 3.5], [0, 6, 0]])
    assert close(rewards_of(pair, shaping=PLAIN), [[0, 0, 5], [0, 6, 0]])
    assert close(credit_of(pair, shaping=replace).scores, [-1.5, 6])


def test_the_length_penalty_counts_the_whole_response():
    pair = hand_trajectory(lengths=[3, 2], forced=[2, 0], width=3, scores=[5.0, 6.0])
    shaped = credit_of(pair, shaping=ShapingConfig(missing_stop="none", length_penalty=0.5)).scores
    assert close(shaped, [3.5, 5])


def test_clip_comes_before_the_missing_stop_penalty():
    pair = hand_trajectory(lengths=[1, 1], forced=[0, 0], width=1, scores=[9.0, -9.0], ended=[False, True])
    subtract = ShapingConfig(clip=2.0, missing_stop="subtract", missing_stop_penalty=3.0)
    assert close(credit_of(pair, shaping=subtract).scores, [-1, -2])


# --- normalising scores -----------------------------------------------------------------------------------


def scored(*scores: float, ended: tuple[bool, ...] | None = None) -> Trajectory:
    number = len(scores)
    return hand_trajectory(
        lengths=[1] * number, forced=[0] * number, width=1, scores=list(scores), ended=ended
    )


def test_batch_normalisation_uses_this_batch_alone():
    shaping = ShapingConfig(normalise="batch", missing_stop="none")
    running = RunningMoments()
    assert close(credit_of(scored(1.0, 3.0), shaping=shaping, running=running).scores, [-1, 1])
    assert close(credit_of(scored(5.0, 7.0), shaping=shaping, running=running).scores, [-1, 1])
    assert running.count == 0


def test_running_normalisation_remembers():
    shaping = ShapingConfig(normalise="running", missing_stop="none")
    running = RunningMoments()
    assert close(credit_of(scored(1.0, 3.0), shaping=shaping, running=running).scores, [-1, 1])
    # 1, 3, 5, 7: mean 4, variance 5
    second = credit_of(scored(5.0, 7.0), shaping=shaping, running=running).scores
    assert close(second, [1 / 5**0.5, 3 / 5**0.5])


def test_without_normalisation_the_running_moments_stay_untouched():
    running = RunningMoments()
    assert close(credit_of(scored(1.0, 3.0), running=running).scores, [1, 3])
    assert running.count == 0


def test_normalise_then_clip_then_missing_stop():
    shaping = ShapingConfig(normalise="batch", clip=0.75, missing_stop="subtract", missing_stop_penalty=0.5)
    assert close(credit_of(scored(1.0, 3.0, ended=(False, True)), shaping=shaping).scores, [-1.25, 0.75])


def sampled(rows: Trajectory) -> tuple[Tensor, Tensor, Tensor]:
    return rows.logprobs, rows.ref_logprobs, rows.action_mask


# --- KL ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator, expected",
    [
        ("k1", [1 + 2, 0 + 1 - 1]),
        ("k2", [0.5 + 2, 0 + 0.5 + 0.5]),
        ("k3", [math.exp(-1) + math.exp(-2) - 2 + 3, 0 + math.exp(-1) + (math.e - 2)]),
    ],
)
def test_the_kl_of_an_episode_is_that_of_its_policy_tokens(trajectory, estimator, expected):
    assert close(sequence_kl(*sampled(trajectory), estimator), expected)


def test_the_coefficient_scales_the_kl_reward(trajectory):
    assert close(rewards_of(trajectory, kl_coef=0.0), [[0, 0, 0, 3, 0], [0, 0, -1, 0, 0]])
    assert close(rewards_of(trajectory, kl_coef=1.0), [[0, 0, -1, 1, 0], [0, -1, 0, 0, 0]])


def test_total_reward_is_the_score_minus_the_weighted_kl(trajectory):
    for masking in ("paper", "release"):
        credit = credit_of(trajectory, masking, advantage=AdvantageConfig(gamma=1.0, lam=1.0, whiten=False))
        first = credit.value_mask.int().argmax(dim=1, keepdim=True)
        whole_return = credit.returns.gather(1, first).squeeze(1)  # gamma = lambda = 1: the sum of rewards
        assert torch.allclose(whole_return, credit.scores - 0.1 * credit.kl.sum(dim=1), atol=1e-4)


def test_controllers():
    fixed, adaptive = KLConfig(coef=0.2).controller(), KLConfig(coef=0.2, target_per_token=0.5).controller()
    assert isinstance(fixed, FixedKL) and fixed.coef == 0.2
    assert isinstance(adaptive, AdaptiveKL) and adaptive.coef == 0.2 and adaptive.target == 0.5


@pytest.mark.parametrize("estimator, expected", [("k1", 3 / 5), ("k2", 3.5 / 5), ("k3", 2.58938 / 5)])
def test_kl_per_token_is_that_of_all_policy_tokens_together(trajectory, estimator, expected):
    """Log-ratios 1, 2 and 0, 1, -1; k3: 0.36788 + 1.13534 and 0 + 0.36788 + 0.71828."""
    assert kl_per_token(*sampled(trajectory), estimator).item() == pytest.approx(expected, abs=1e-4)


def test_same_policy_moves_kl_controllers_of_ppo_and_drpo_alike():
    """A policy 0.55 nats a token from its reference, responses of 8 tokens, of which DR-PO forces 6 and 2.

    At a target of 0.5 the error is 0.55 / 0.5 - 1 = 0.1, the coefficient 0.1 (1 + 0.1 * 2 / 100) = 0.1002. Summed over
    an episode, PPO has 4.4 nats and DR-PO 2.2: at a target of 4 the one would raise and the other lower it.
    """
    adapted = {}
    for name, forced in (("ppo", [0, 0]), ("drpo", [6, 2])):
        rows = hand_trajectory(lengths=[8, 8], forced=forced, width=8, log_ratios=[[0.55] * 8] * 2)
        assert close(sequence_kl(*sampled(rows), "k1").mean(), 4.4 if name == "ppo" else 2.2)
        controller = KLConfig(coef=0.1, target_per_token=0.5, horizon=100).controller()
        controller.update(kl_per_token(*sampled(rows), "k1").item(), num_episodes=2)
        adapted[name] = controller.coef
    assert adapted["ppo"] == pytest.approx(0.1002, rel=1e-6)
    assert adapted["drpo"] == pytest.approx(0.1002, rel=1e-6)


# --- nothing is changed in place --------------------------------------------------------------------------


def test_the_trajectory_is_not_changed(trajectory):
    fields = {f.name: getattr(trajectory, f.name) for f in dataclasses.fields(trajectory)}
    before = {name: value.clone() for name, value in fields.items() if isinstance(value, torch.Tensor)}
    credit_of(trajectory, advantage=EVERYTHING, shaping=ShapingConfig(normalise="batch", clip=1.0))
    assert all(torch.equal(getattr(trajectory, name), value) for name, value in before.items())


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda: ShapingConfig(missing_stop_penalty=-1.0), "missing_stop_penalty"),
        (lambda: ShapingConfig(clip=0.0), "clip"),
        (lambda: KLConfig(coef=-0.1), "coef"),
        (lambda: KLConfig(target_per_token=0.0), "target_per_token"),
        (lambda: KLConfig(coef=0.0, target_per_token=0.1), "coef"),
        (lambda: KLConfig(horizon=0.0), "horizon"),
        (lambda: KLConfig(max_per_token=0.0), "max_per_token"),
        (lambda: AdvantageConfig(gamma=1.1), "gamma"),
        (lambda: AdvantageConfig(lam=-0.1), "lam"),
    ],
)
def test_impossible_settings_are_refused_by_name(make, key):
    with pytest.raises(ValueError, match=f"^{key} must be "):
        make()
