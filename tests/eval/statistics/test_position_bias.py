"""Judges with a known taste for a slot, and what is said of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from eval.statistics.position_bias import position_bias
from eval.statistics.win_rate import win_rate

nan = float("nan")


def two_orders(rng, size, better, first_pull, noise=0.0):
    """First slot's wins of a judge who adds `first_pull` to the first response's quality, (size, 2)."""
    gap = rng.normal(better, 1, size)
    ab = gap + first_pull + noise * rng.normal(size=size) > 0
    ba = -gap + first_pull + noise * rng.normal(size=size) > 0
    return np.stack([ab, ba], axis=1).astype(float)


def test_a_judge_that_always_takes_the_first():
    wins = np.ones((200, 2))
    result = position_bias(wins)
    assert result.first_share == 1
    assert (result.first_twice, result.second_twice) == (200, 0)
    assert result.p_value == pytest.approx(2 * 0.5**200)
    assert result.consistency.agreement == 0
    assert result.consistency.high < 0.02
    scores_of_a = (wins[:, 0] + 1 - wins[:, 1]) / 2
    assert win_rate(scores_of_a).rate == 0.5


def test_a_judge_that_ignores_the_order():
    result = position_bias(two_orders(np.random.default_rng(0), 200, 0.4, 0))
    assert result.first_share == 0.5
    assert result.p_value == 1
    assert (result.consistency.agreement, result.consistency.kappa) == (1, 1)


def test_the_sign_test_by_hand():
    # First twice 5, second twice 1, the rest consistent: 2 (C(6,0) + C(6,1)) / 2^6 = 14 / 64.
    wins = [[1, 1]] * 5 + [[0, 0]] + [[1, 0]] * 20 + [[0, 1]] * 4 + [[0.5, 0.5]] * 3
    result = position_bias(wins)
    assert result.p_value == pytest.approx(14 / 64)
    assert (result.first_twice, result.second_twice, result.num_calls) == (5, 1, 66)
    assert result.first_share == pytest.approx((10 + 24 + 3) / 66)
    assert result.consistency.agreement == pytest.approx(27 / 33)


def test_a_tie_in_one_order_leans_too():
    # (1, tie) leans to the first slot as (1, 1) does, though less; it is not consistent.
    result = position_bias([[1, 0.5]] * 6 + [[1, 0]] * 2)
    assert result.p_value == pytest.approx(2 / 64)
    assert result.consistency.agreement == pytest.approx(2 / 8)


def test_one_order_per_comparison():
    wins = np.array([1.0] * 30 + [0.0] * 10)
    result = position_bias(wins)
    assert result.consistency is None
    assert (result.first_share, result.num_calls) == (0.75, 40)
    assert result.p_value == pytest.approx(2 * binom.sf(29, 40, 0.5))
    assert position_bias([(win,) for win in wins]) == result


def test_a_coin_is_consistent_by_chance_alone():
    wins = np.random.default_rng(1).integers(0, 2, (2000, 2)).astype(float)
    result = position_bias(wins)
    assert result.consistency.agreement == pytest.approx(0.5, abs=0.04)
    assert result.consistency.kappa_low < 0 < result.consistency.kappa_high


def test_a_pull_to_the_first_slot_is_seen():
    result = position_bias(two_orders(np.random.default_rng(2), 300, 0.3, 0.3))
    assert result.low > 0.5
    assert result.p_value < 1e-6
    assert 0.6 < result.consistency.agreement < 0.9
    assert result.consistency.kappa_low > 0


def test_missing_verdicts_are_left_out():
    wins = [(1, 1), (None, 1), (0, 1), (nan, None), (1, 0)]
    with_missing, without = position_bias(wins), position_bias([(1, 1), (0, 1), (1, 0)])
    assert with_missing.undecided == 3
    assert with_missing.consistency.undecided == 2
    assert (with_missing.first_share, with_missing.num_calls) == (without.first_share, without.num_calls)
    assert with_missing.p_value == without.p_value


def test_many_comparisons_on_one_prompt_are_one_draw():
    wins = np.array([[1, 1]] * 3 + [[0, 1]] * 4)
    once = position_bias(wins)
    again = position_bias(np.tile(wins, (10, 1)), np.tile(np.arange(7), 10))
    assert again.p_value == once.p_value
    assert (again.low, again.high) == pytest.approx((once.low, once.high))


def test_level_and_coverage():
    # Without a pull the test must be silent. Two calls on one comparison are not independent: the share's
    # interval is for their mean.
    rng = np.random.default_rng(3)
    alarms = covered = 0
    repetitions = 1000
    truth = position_bias(two_orders(rng, 400_000, 0.5, 0.2, 1)).first_share
    for _ in range(repetitions):
        alarms += position_bias(two_orders(rng, 150, 0.5, 0, 1)).p_value <= 0.05
        pulled = position_bias(two_orders(rng, 150, 0.5, 0.2, 1))
        covered += pulled.low <= truth <= pulled.high
    assert 0.02 < alarms / repetitions < 0.07  # an exact test of whole numbers stays below its level
    assert covered / repetitions == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(
    ("wins", "message"),
    [
        (np.ones((3, 3)), r"\(n,\) or \(n, 2\), got shape \(3, 3\)"),
        ([[1, nan], [nan, 0]], "none of 2 comparisons has all its verdicts"),
        ([[1, 2]], r"first_slot_wins must be in \[0, 1\]"),
        ([], "first_slot_wins has no rows"),
    ],
)
def test_bad_input_is_refused(wins, message):
    with pytest.raises(ValueError, match=message):
        position_bias(wins)
