"""One number from several runs: hand values, the functions for one run, what several runs do to an interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t as student
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

from eval.statistics.across_runs import Values, difference, measured, run_matrix, widened_by_runs
from eval.statistics.intervals import Interval
from eval.statistics.seeds import seed_difference, seed_interval
from eval.statistics.win_rate import paired_test

nan = float("nan")


def values(numbers, prompts="abcdefghijklmnopqrst"):
    return Values(tuple(prompts[: len(numbers)]), np.array(numbers, dtype=float))


def test_a_matrix_of_prompts_by_hand():
    first = Values(("q", "p", "q"), np.array([1.0, 5.0, 2.0]))
    second = Values(("r", "p"), np.array([7.0, nan]))
    prompts, matrix = run_matrix([first, second])
    assert prompts == ("p", "q", "r")
    assert np.array_equal(matrix, [[5, 1.5, nan], [nan, nan, 7]], equal_nan=True)
    with pytest.raises(ValueError, match="2 numbers of 1 prompts"):
        Values(("p",), np.zeros(2))


def test_one_run_of_wins_has_wilsons_interval():
    result = measured([values([1, 1, 1, 0, nan])], (0.0, 1.0))
    low, high = proportion_confint(3, 4, method="wilson")
    assert (result.value, result.low, result.high) == pytest.approx((0.75, low, high))
    assert result.runs == (0.75,) and result.method == "wilson"


def test_one_run_of_any_measure_counts_a_prompt_once():
    once = measured([values([3.0, -1.0, 4.0, 2.0])])
    twice = measured([Values(("a", "a", "b", "c", "d"), np.array([2.0, 4.0, -1.0, 4.0, 2.0]))])
    assert (once.value, once.low, once.high) == (twice.value, twice.low, twice.high)
    assert once.value == 2 and once.low < 2 < once.high and once.method == "bca"


def test_several_runs_have_the_interval_over_seeds():
    numbers = np.random.default_rng(0).random((3, 12))
    result = measured([values(row) for row in numbers], (0.0, 1.0))
    expected = seed_interval(numbers)
    assert (result.low, result.high, result.method) == (expected.low, expected.high, "seeds")
    assert result.runs == pytest.approx(numbers.mean(axis=1)) and result.value == pytest.approx(
        numbers.mean()
    )


def test_a_run_that_went_otherwise_makes_the_interval_wide():
    alike = measured([values([1, 2, 3, 4]), values([1, 2, 3, 4.5])])
    apart = measured([values([1, 2, 3, 4]), values([5, 6, 7, 8.5])])
    assert apart.high - apart.low > 5 * (alike.high - alike.low)


def test_one_prompt_has_no_interval_and_an_empty_run_is_named():
    result = measured([values([2.0]), values([4.0])])
    assert (result.value, result.low, result.high) == (3.0, None, None)
    with pytest.raises(ValueError, match=r"runs \[1\] have no number"):
        measured([values([1.0, 0.0]), values([nan, nan])])


def test_widening_by_hand():
    interval = Interval(0.5, 0.4, 0.63, 40, "glm")
    result = widened_by_runs(interval, [0.4, 0.5, 0.6])
    spread = student.isf(0.025, 2) * 0.1 / math.sqrt(3)
    assert result.low == pytest.approx(0.5 - math.sqrt(0.1**2 + spread**2))
    assert result.high == pytest.approx(0.5 + math.sqrt(0.13**2 + spread**2))
    alone = widened_by_runs(interval, [0.5])
    assert (alone.low, alone.high) == (0.4, 0.63)
    assert widened_by_runs(interval, [0.0, 1.0]).low == 0.0


def test_a_difference_is_taken_on_shared_prompts_only():
    one = Values(("a", "b", "c"), np.array([1.0, 1.0, 0.0]))
    two = Values(("c", "b", "z"), np.array([0.0, 0.0, 1.0]))
    result, expected = difference([one], [two]), paired_test([1.0, 0.0], [0.0, 0.0])
    assert (result.difference, result.p_value) == (expected.difference, expected.p_value) == (0.5, 1.0)
    assert result.num_prompts == 2 and result.over == "prompts"
    # Differences 1 and 0, two prompts: the test of mean d / (sd / sqrt 2) with power 0.8 and one degree of freedom.
    shift = TTestPower().solve_power(nobs=2, alpha=0.05, power=0.8)
    assert result.detectable == pytest.approx(shift * math.sqrt(0.5))
    with pytest.raises(ValueError, match="share no prompts"):
        difference([one], [Values(("y",), np.array([1.0]))])


def test_the_difference_of_two_methods_with_seeds():
    generator = np.random.default_rng(1)
    one, two = generator.random((3, 9)), generator.random((2, 9))
    result = difference([values(row) for row in one], [values(row) for row in two])
    expected = seed_difference(one, two)
    assert (result.difference, result.low, result.p_value) == (
        expected.difference,
        expected.low,
        expected.p_value,
    )
    assert result.over == "seeds and prompts" and result.detectable is None


def test_who_wins_everything_differs_from_who_loses_everything():
    """Neither seeds nor prompts vary: of the sign flips of 12 prompts, 2 are as far from 0."""
    always, never = [values([1.0] * 12)] * 2, [values([0.0] * 12)] * 3
    result = difference(always, never)
    assert (result.difference, result.p_value) == (1.0, pytest.approx(2 / 2**12))
    assert 0 < result.low < result.high == 1 and result.over == "prompts"
    assert difference(always, always).p_value == 1.0


def test_against_one_run_the_means_of_the_prompts_are_compared():
    runs = [values([1, 0, 1, 1]), values([1, 1, 0, 1])]
    result = difference(runs, [values([0, 0, 0, 0])])
    assert result.over == "prompts"
    assert result.difference == pytest.approx(paired_test([1, 0.5, 0.5, 1], [0] * 4).difference)


def test_a_limit_stops_at_what_cannot_be_less():
    apart = [values([0.1, 0.2, 0.1, 0.3]), values([5.0, 6.0, 4.0, 5.5])]
    free, cut = measured(apart), measured(apart, floor=0.0)
    assert free.low < 0 == cut.low and (cut.value, cut.high) == (free.value, free.high)
    below = measured([values([-0.2, -0.1, 0.05, -0.1])], floor=0.0)
    assert below.low == below.value < 0, (
        "an estimate of a KL may fall below 0, and its limit then goes no further"
    )
