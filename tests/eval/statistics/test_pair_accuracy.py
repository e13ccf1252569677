"""Accuracy on pairs: hand-counted outcomes, prompts as units, groups and bins."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from eval.statistics.pair_accuracy import accuracy_by, equal_mass_bins, number_groups, outcomes, pair_accuracy


def test_outcomes_by_hand():
    assert outcomes([2.0, -1e-9, 0.0]).tolist() == [1, 0, 0.5]


def test_single_pairs_have_wilsons_interval():
    found = pair_accuracy([1.0] * 7 + [-1.0] * 3)
    limits = binomtest(7, 10).proportion_ci(method="wilson")
    assert (found.n, found.right, found.ties, found.wrong) == (10, 7, 0, 3)
    assert (found.accuracy.value, found.of_pairs, found.strict_of_pairs) == (0.7, 0.7, 0.7)
    assert (found.accuracy.low, found.accuracy.high) == pytest.approx((limits.low, limits.high))
    assert found.accuracy.method == "wilson"


def test_ties_are_half_or_wrong():
    found = pair_accuracy([1.0, 1.0, 0.0, -1.0])
    assert (found.right, found.ties, found.wrong) == (2, 1, 1)
    assert (found.accuracy.value, found.of_pairs, found.strict_of_pairs) == (0.625, 0.625, 0.5)


def test_each_prompt_counts_once():
    found = pair_accuracy([1.0, 1.0, 1.0, -1.0], ["a", "a", "a", "b"])
    assert found.accuracy.value == 0.5 and found.of_pairs == 0.75
    assert found.accuracy.num_prompts == 2


def test_repeated_pairs_do_not_narrow_the_interval():
    rng = np.random.default_rng(0)
    margins, prompts = rng.normal(0.3, 1, 60), np.arange(60)
    once = pair_accuracy(margins, prompts).accuracy
    often = pair_accuracy(np.repeat(margins, 9), np.repeat(prompts, 9)).accuracy
    assert often.value == pytest.approx(once.value)
    assert often.high - often.low >= 0.99 * (once.high - once.low)


def test_groups_keep_their_order_and_their_prompts():
    found = accuracy_by([1.0, -1.0, 1.0, 1.0], ["b", "a", "b", "a"], [0, 0, 0, 1])
    assert list(found) == ["b", "a"]
    assert (found["b"].n, found["b"].accuracy.num_prompts, found["b"].accuracy.value) == (2, 1, 1.0)
    assert (found["a"].n, found["a"].accuracy.num_prompts, found["a"].accuracy.value) == (2, 2, 0.5)


@pytest.mark.parametrize(
    ("values", "num_bins", "expected"),
    [
        ([4, 1, 3, 2], 2, [1, 0, 1, 0]),
        ([1, 1, 1, 2], 2, [0, 0, 0, 1]),
        ([5, 5, 5], 3, [0, 0, 0]),
        ([1, 2, 3], 1, [0, 0, 0]),
    ],
)
def test_bins_by_hand(values, num_bins, expected):
    assert equal_mass_bins(values, num_bins).tolist() == expected


def test_bins_have_equal_mass_and_keep_order():
    values = np.random.default_rng(1).normal(size=103)
    bins = equal_mass_bins(values, 10)
    assert np.bincount(bins).min() >= 10 and np.bincount(bins).max() <= 11
    assert (np.diff(bins[np.argsort(values)]) >= 0).all()


def test_numbers_are_named_by_value_or_by_range():
    assert number_groups([2, 1, 2.5], 3) == ["2", "1", "2.5"]
    assert number_groups([1, 2, 3, 4], 2) == ["1 to 2", "1 to 2", "3 to 4", "3 to 4"]
    assert number_groups([1_000_001, 1_000_002], 2) == ["1000001", "1000002"], (
        "numbers apart have names apart"
    )


def test_bad_pairs_are_refused():
    with pytest.raises(ValueError, match="margins is nan in 1 of 2"):
        pair_accuracy([float("nan"), 1.0])
    with pytest.raises(ValueError, match="margins has no rows"):
        pair_accuracy([])
    with pytest.raises(ValueError, match="unequal numbers of rows: margins 2, groups 1"):
        accuracy_by([1.0, 2.0], ["a"])
