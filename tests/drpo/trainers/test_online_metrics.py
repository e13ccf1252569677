"""What is reported of a batch of rollouts, against naive loops over rows and tokens."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch
from hand_rollouts import JUNK, hand_trajectory, rows

from drpo.rewards import RunningMoments
from drpo.rollout.trajectory import Trajectory
from drpo.trainers.credit import AdvantageConfig, Credit, KLConfig, ShapingConfig, assign_credit
from drpo.trainers.online_metrics import PREFIX_BINS, SHOWN, online_metrics

WIDTH = 9
LENGTHS = [4, 7, 9, 3, 9, 2]
FORCED = [0, 2, 8, 0, 6, 1]
SOURCES = [0, 8, 9, 0, 8, 8]  # h / L = -, 0.25, 0.89, -, 0.75, 0.125
SCORES = [1.5, -2.0, 0.25, 3.0, -1.0, 7.0]
ENDED = [True, True, False, True, False, True]
KL_COEF = 0.3


def token_values(seed: int, low: float, high: float) -> list[list[float]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(n, generator=generator) * (high - low) + low).tolist() for n in LENGTHS]


LOG_RATIOS, VALUES, ENTROPY = token_values(0, -2, 2), token_values(1, -3, 3), token_values(2, 0, 5)


@pytest.fixture
def trajectory() -> Trajectory:
    return hand_trajectory(
        lengths=LENGTHS,
        forced=FORCED,
        width=WIDTH,
        scores=SCORES,
        ended=ENDED,
        log_ratios=LOG_RATIOS,
        values=VALUES,
        entropy=ENTROPY,
        source_lengths=SOURCES,
    )


def credit_of(trajectory: Trajectory, masking: str = "paper") -> Credit:
    shaping = ShapingConfig(missing_stop="subtract", missing_stop_penalty=1.0)
    advantage = AdvantageConfig(gamma=1.0, lam=0.9, whiten=True)
    return assign_credit(trajectory, shaping, KLConfig(), KL_COEF, advantage, masking, RunningMoments())


def metrics_of(trajectory: Trajectory, masking: str = "paper") -> dict[str, float]:
    return online_metrics(trajectory, credit_of(trajectory, masking), KL_COEF)


def tokens(row: int, masking: str = "paper") -> range:
    return range(FORCED[row] if masking == "paper" else 0, LENGTHS[row])


def row_kl(row: int, estimator: str) -> float:
    total = 0.0
    for t in tokens(row):
        d = LOG_RATIOS[row][t]
        total += d if estimator == "k1" else math.exp(-d) - 1 + d
    return total


def test_scores_of_the_responses_reset_to_are_averaged_over_rollouts_with_a_forced_token():
    rollouts = {"lengths": [3, 4, 5], "forced": [0, 2, 3], "width": 5, "source_lengths": [0, 6, 7]}
    metrics = metrics_of(hand_trajectory(**rollouts, source_scores=[100.0, 1.0, 4.0]))
    assert metrics["reset/source_score"] == 2.5
    assert "reset/source_score" not in metrics_of(hand_trajectory(**rollouts))


# --- objective --------------------------------------------------------------------------------------------


def test_scores(trajectory):
    metrics = metrics_of(trajectory)
    assert metrics["objective/score"] == pytest.approx(statistics.mean(SCORES))
    assert metrics["objective/score_std"] == pytest.approx(statistics.pstdev(SCORES), rel=1e-5)
    assert metrics["objective/shaped_score"] == pytest.approx(statistics.mean(SCORES) - 2 / 6)
    assert metrics["objective/ended"] == pytest.approx(4 / 6)
    assert metrics["objective/kl_coef"] == KL_COEF


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("masking", ["paper", "release"])
def test_kl_is_summed_over_policy_tokens_alone(trajectory, estimator, masking):
    """Also under release masking: on tokens that the policy did not sample a log ratio estimates no KL."""
    expected = statistics.mean(row_kl(row, estimator) for row in range(6))
    assert metrics_of(trajectory, masking)[f"objective/kl_{estimator}"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("masking", ["paper", "release"])
def test_kl_per_token_is_the_mean_over_policy_tokens_alone(trajectory, estimator, masking):
    total = sum(row_kl(row, estimator) for row in range(6))
    expected = total / sum(len(tokens(row)) for row in range(6))
    measured = metrics_of(trajectory, masking)[f"objective/kl_{estimator}_per_token"]
    assert measured == pytest.approx(expected, rel=1e-4)


def test_entropy_is_the_mean_over_policy_tokens_alone(trajectory):
    """TRL sums log-probs over the row, padding included as +1 (reported 12.73 where the truth was 20.41)."""
    sampled = [ENTROPY[row][t] for row in range(6) for t in tokens(row)]
    assert metrics_of(trajectory)["objective/entropy"] == pytest.approx(statistics.mean(sampled), rel=1e-5)


@pytest.mark.parametrize("masking", ["paper", "release"])
def test_total_is_the_shaped_score_minus_the_weighted_kl_of_the_reward(trajectory, masking):
    totals = []
    for row in range(6):
        shaped = SCORES[row] - (0.0 if ENDED[row] else 1.0)
        totals.append(shaped - KL_COEF * sum(LOG_RATIOS[row][t] for t in tokens(row, masking)))
    assert metrics_of(trajectory, masking)["objective/total"] == pytest.approx(
        statistics.mean(totals), rel=1e-4
    )


def test_details_of_the_reward_are_means_over_rollouts(trajectory):
    names, details = (
        ("format", "rm/spread"),
        [[1.0, 0.5], [0.0, 1.5], [1.0, 0.0], [1.0, 2.0], [0.0, 0.0], [0.0, 2.0]],
    )
    detailed = dataclasses.replace(trajectory, reward_names=names, reward_details=torch.tensor(details))
    metrics = metrics_of(detailed)
    assert metrics["reward/format"] == 0.5 and metrics["reward/rm/spread"] == 1.0
    assert not [key for key in metrics_of(trajectory) if key.startswith("reward/")]


def test_lengths(trajectory):
    metrics = metrics_of(trajectory)
    assert metrics["objective/length"] == pytest.approx(34 / 6)
    assert metrics["objective/length_max"] == 9
    assert metrics["objective/sampled_length"] == pytest.approx((34 - 17) / 6)


# --- value ------------------------------------------------------------------------------------------------


def naive_returns(masking: str) -> tuple[list[float], list[float]]:
    """Values and returns of the counted tokens, row by row, by the definition of GAE."""
    values, returns = [], []
    for row in range(6):
        columns = list(tokens(row, masking))
        shaped = SCORES[row] - (0.0 if ENDED[row] else 1.0)
        rewards = {t: -KL_COEF * LOG_RATIOS[row][t] for t in columns}
        rewards[columns[-1]] += shaped
        for t in columns:
            advantage = 0.0
            for later in range(t, LENGTHS[row]):
                next_value = VALUES[row][later + 1] if later + 1 < LENGTHS[row] else 0.0
                advantage += 0.9 ** (later - t) * (rewards[later] + next_value - VALUES[row][later])
            values.append(VALUES[row][t])
            returns.append(advantage + VALUES[row][t])
    return values, returns


@pytest.mark.parametrize("masking", ["paper", "release"])
def test_value_statistics(trajectory, masking):
    metrics = metrics_of(trajectory, masking)
    values, returns = naive_returns(masking)
    errors = [g - v for g, v in zip(returns, values, strict=True)]
    assert metrics["value/mean"] == pytest.approx(statistics.mean(values), rel=1e-4)
    assert metrics["value/return_mean"] == pytest.approx(statistics.mean(returns), rel=1e-4)
    assert metrics["value/return_std"] == pytest.approx(statistics.pstdev(returns), rel=1e-4)
    assert metrics["value/explained_variance"] == pytest.approx(
        1 - statistics.pvariance(errors) / statistics.pvariance(returns), rel=1e-4
    )


# --- by start ---------------------------------------------------------------------------------------------

GROUPS = {
    "from_prompt": [0, 3],
    "from_reset": [1, 2, 4, 5],
    "prefix_0_0.25": [1, 5],  # 2/8 and 1/8: the upper end belongs to the bin
    "prefix_0.5_0.75": [4],  # 6/8
    "prefix_0.75_1": [2],  # 8/9
}


@pytest.mark.parametrize("group", GROUPS)
def test_groups_hold_the_means_of_their_rows(trajectory, group):
    metrics, members = metrics_of(trajectory), GROUPS[group]
    assert metrics[f"{group}/score"] == pytest.approx(statistics.mean(SCORES[row] for row in members))
    assert metrics[f"{group}/ended"] == pytest.approx(statistics.mean(ENDED[row] for row in members))
    assert metrics[f"{group}/sampled_length"] == pytest.approx(
        statistics.mean(LENGTHS[row] - FORCED[row] for row in members)
    )
    assert metrics[f"{group}/kl_k3"] == pytest.approx(
        statistics.mean(row_kl(row, "k3") for row in members), rel=1e-4
    )
    assert metrics[f"{group}/kl_k3_per_token"] == pytest.approx(
        sum(row_kl(row, "k3") for row in members) / sum(len(tokens(row)) for row in members), rel=1e-4
    )


def test_an_empty_group_has_no_keys(trajectory):
    metrics = metrics_of(trajectory)
    assert not [key for key in metrics if key.startswith("prefix_0.25_0.5")]


def test_reset_statistics(trajectory):
    metrics = metrics_of(trajectory)
    assert metrics["reset/share"] == pytest.approx(4 / 6)
    assert metrics["reset/prefix_length"] == pytest.approx(17 / 4)
    assert metrics["reset/prefix_fraction"] == pytest.approx((2 / 8 + 8 / 9 + 6 / 8 + 1 / 8) / 4)


def test_without_resets_there_are_no_reset_keys(trajectory):
    ppo = dataclasses.replace(
        trajectory,
        reset_lengths=torch.zeros(6, dtype=torch.long),
        source_lengths=torch.zeros(6, dtype=torch.long),
    )
    metrics = metrics_of(ppo)
    assert metrics["reset/share"] == 0
    assert not [key for key in metrics if key.startswith(("from_reset", "prefix_", "reset/prefix"))]
    assert metrics["from_prompt/score"] == metrics["objective/score"]


def test_every_reset_is_in_exactly_one_bin():
    """All prefixes h = 1 .. L-1 of responses of 2 to 40 tokens."""
    cases = [(h, length) for length in range(2, 41) for h in range(1, length)]
    number = len(cases)
    trajectory = hand_trajectory(
        lengths=[41] * number,
        forced=[h for h, _ in cases],
        width=41,
        scores=[1.0] * number,
        source_lengths=[length for _, length in cases],
    )
    metrics = metrics_of(trajectory)
    for low, high in PREFIX_BINS:
        inside = [h for h, length in cases if low * length < h <= high * length]
        sampled = statistics.mean(41 - h for h in inside)
        assert metrics[f"prefix_{low:g}_{high:g}/sampled_length"] == pytest.approx(sampled, rel=1e-5)
    assert sum(len([1 for h, n in cases if low * n < h <= high * n]) for low, high in PREFIX_BINS) == number


def test_the_rollout_engine_is_compared_over_sampled_tokens(trajectory):
    assert not [key for key in metrics_of(trajectory) if key.startswith("rollout/")]
    differences = token_values(3, -0.5, 0.8)  # log pi - log mu
    engine_logprobs = trajectory.logprobs - rows(differences, WIDTH)
    metrics = metrics_of(dataclasses.replace(trajectory, engine_logprobs=engine_logprobs))
    sampled = [differences[row][t] for row in range(6) for t in tokens(row)]
    ratios = [math.exp(d) for d in sampled]
    expected = {
        "logprob_difference": statistics.mean(map(abs, sampled)),
        "logprob_difference_max": max(map(abs, sampled)),
        "importance_ratio": statistics.mean(ratios),
        "importance_ratio_min": min(ratios),
        "importance_ratio_max": max(ratios),
    }
    found = {key.removeprefix("rollout/"): v for key, v in metrics.items() if key.startswith("rollout/")}
    assert found == pytest.approx(expected, rel=1e-4)


# --- nothing from outside ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [JUNK, math.inf, math.nan])
def test_forced_tokens_and_padding_reach_no_metric(trajectory, value):
    outside = trajectory.action_mask.logical_not()
    names = ("logprobs", "ref_logprobs", "values", "entropy")
    other = dataclasses.replace(
        trajectory, **{name: getattr(trajectory, name).masked_fill(outside, value) for name in names}
    )
    assert metrics_of(other) == metrics_of(trajectory)


def test_all_metrics_are_plain_finite_floats(trajectory):
    metrics = metrics_of(trajectory)
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())


def test_shown_keys_are_reported_by_a_step(trajectory):
    # The others come from the update, the evaluation (test_peers holds its keys) and the clock.
    from_rollouts = {key for key in SHOWN if key.startswith("objective/")}
    assert len(from_rollouts) == 5 and from_rollouts <= metrics_of(trajectory).keys()
