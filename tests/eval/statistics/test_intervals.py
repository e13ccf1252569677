"""Intervals over prompts: by hand, by naive loops, by invariance, and by how often they cover the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.statistics.intervals import mean_interval, prompt_codes, prompt_means, rate_interval


def rate(scores, prompt_ids=None, confidence=0.95):
    scores = np.asarray(scores, dtype=float)
    return rate_interval(scores, prompt_codes(prompt_ids, len(scores)), confidence)


def wilson(share, size, z):
    centre = (share + z * z / (2 * size)) / (1 + z * z / size)
    half = z * math.sqrt(share * (1 - share) / size + z * z / (4 * size * size)) / (1 + z * z / size)
    return centre - half, centre + half


# --- rates ------------------------------------------------------------------------------------------------


def test_wilson_by_hand():
    # 7 of 10, z^2 = 3.8415: (0.7 + 0.19207) / 1.38415 = 0.64450; 1.96 / 1.38415 sqrt(0.021 + 0.0096036) = 0.24772
    interval = rate([1] * 7 + [0] * 3)
    assert interval.value == pytest.approx(0.7)
    assert (interval.low, interval.high) == pytest.approx((0.3968, 0.8922), abs=1e-4)
    assert (interval.method, interval.num_prompts) == ("wilson", 10)


def test_all_won_is_not_certain():
    # 600 of 600: n / (n + z^2) = 600 / 603.84. The normal interval would be 1 to 1.
    interval = rate(np.ones(600))
    assert interval.low == pytest.approx(600 / 603.8415, abs=1e-6)
    assert interval.high == 1.0
    lost = rate(np.zeros(600))
    assert (lost.low, lost.high) == pytest.approx((0.0, 3.8415 / 603.8415), abs=1e-6)
    assert lost.low == 0.0


def test_shared_scores_by_a_loop():
    # Prompt means 1, 0.5, 0.25, 0.5: mean 0.5625, s^2 = 0.296875 / 3; t with 3 degrees is 3.182446.
    interval = rate([1, 0, 1, 0.25, 0.5], ["a", "b", "b", "c", "d"])
    share = 0.5625
    variance = sum((m - share) ** 2 for m in (1, 0.5, 0.25, 0.5)) / 3 / 4
    expected = wilson(share, share * (1 - share) / variance, 3.182446305284263)
    assert (interval.low, interval.high) == pytest.approx(expected)
    assert (interval.method, interval.num_prompts) == ("wilson_effective", 4)


def test_more_verdicts_on_the_same_prompts_add_nothing():
    rng = np.random.default_rng(0)
    scores, prompts = rng.choice([0, 0.5, 1], size=120), np.arange(120)
    once, four_times = rate(scores, prompts), rate(np.tile(scores, 4), np.tile(prompts, 4))
    assert (four_times.low, four_times.high) == pytest.approx((once.low, once.high))
    wins = (scores > 0).astype(float)
    once, four_times = rate(wins, prompts), rate(np.tile(wins, 4), np.tile(prompts, 4))
    assert once.high - once.low < four_times.high - four_times.low < 1.02 * (once.high - once.low)


def test_a_tie_everywhere_has_a_width():
    # None of 600 prompts differs from 0.5; with 97.5% confidence at most a share 1 - 0.025^(1/600) does.
    interval = rate(np.full(600, 0.5))
    share = 1 - 0.025 ** (1 / 600)
    assert (interval.low, interval.high) == pytest.approx((0.5 - share / 2, 0.5 + share / 2))
    assert interval.method == "constant"


def test_one_prompt_says_little():
    assert (rate([1]).low, rate([1]).high) == pytest.approx((1 / (1 + 3.8415), 1.0), abs=1e-4)
    interval = rate([1, 0], ["p", "p"])
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.5, 0.0125, 0.9875))


def test_order_and_names_of_prompts_change_nothing():
    rng = np.random.default_rng(1)
    scores, prompts = rng.random(60), rng.integers(0, 20, 60)
    shuffle = rng.permutation(60)
    renamed = np.array([f"prompt {p * 7 % 20}" for p in prompts])
    a, b = rate(scores, prompts), rate(scores[shuffle], renamed[shuffle])
    assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high))


def test_means_by_prompt():
    values = np.array([1.0, np.nan, 3.0, 5.0, np.nan])
    assert prompt_means(values, np.array([2, 2, 0, 0, 1])).tolist() == [4.0, 1.0]
    both = np.stack([values, np.arange(5.0)], axis=1)
    assert prompt_means(both, np.array([2, 2, 0, 0, 1])).tolist() == [[4.0, 2.5], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("num_prompts", "shares"),
    [(60, (0.55, 0, 0.45)), (300, (0.9, 0, 0.1)), (40, (0.4, 0.2, 0.4)), (150, (0.93, 0.05, 0.02))],
)
def test_coverage_of_rates(num_prompts, shares):
    rng = np.random.default_rng(2)
    truth, repetitions = shares[0] + shares[1] / 2, 1500
    covered = 0
    for scores in rng.choice([1.0, 0.5, 0.0], p=shares, size=(repetitions, num_prompts)):
        interval = rate(scores)
        covered += interval.low <= truth <= interval.high
    assert covered / repetitions == pytest.approx(0.95, abs=0.02)


def test_coverage_with_several_verdicts_per_prompt():
    # A prompt's own rate is Beta(1, 1), so its 4 verdicts go together; rows taken as independent cover too seldom.
    rng = np.random.default_rng(3)
    num_prompts, repetitions = 80, 1500
    prompts = np.repeat(np.arange(num_prompts), 4)
    covered = naive = 0
    for _ in range(repetitions):
        scores = (rng.random(4 * num_prompts) < np.repeat(rng.random(num_prompts), 4)).astype(float)
        clustered, rows = rate(scores, prompts), rate(scores)
        covered += clustered.low <= 0.5 <= clustered.high
        naive += rows.low <= 0.5 <= rows.high
    assert covered / repetitions == pytest.approx(0.95, abs=0.02)
    assert naive / repetitions < 0.88


# --- means ------------------------------------------------------------------------------------------------


def test_mean_interval_tends_to_the_normal_one():
    values = np.random.default_rng(4).normal(3, 2, 2000)
    interval = mean_interval(values)
    error = values.std(ddof=1) / math.sqrt(2000)
    assert interval.value == pytest.approx(values.mean())
    assert interval.method == "bca"
    assert (interval.low, interval.high) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.06 * error
    )


def test_mean_interval_moves_with_the_unit_and_the_zero():
    values = np.random.default_rng(5).exponential(size=80)
    a, b = mean_interval(values), mean_interval(7 - 3 * values)
    assert (b.value, b.low, b.high) == pytest.approx(
        (7 - 3 * a.value, 7 - 3 * a.high, 7 - 3 * a.low), rel=1e-3
    )


def test_mean_interval_leans_to_the_long_tail():
    interval = mean_interval(np.random.default_rng(6).exponential(size=60))
    assert interval.high - interval.value > 1.1 * (interval.value - interval.low)


def test_mean_interval_counts_each_prompt_once():
    values = np.random.default_rng(7).exponential(size=50)
    once = mean_interval(values, np.arange(50))
    again = mean_interval(np.tile(values, 5), np.tile(np.arange(50), 5))
    assert (again.value, again.low, again.high, again.num_prompts) == pytest.approx(
        (once.value, once.low, once.high, 50)
    )


def test_mean_interval_is_a_function_of_its_arguments():
    values = np.random.default_rng(8).normal(size=40)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


def test_mean_interval_of_constant_data():
    same = mean_interval(np.zeros(50))
    assert (same.value, same.low, same.high, same.method) == (0, 0, 0, "constant")
    share = 1 - 0.025 ** (1 / 50)
    bounded = mean_interval(np.zeros(50), bounds=(-1, 1))
    assert (bounded.low, bounded.high) == pytest.approx((-share, share))
    rounded = mean_interval(np.array([0.3, 0.1 + 0.2] * 20), bounds=(0, 1))
    assert rounded.method == "constant"


@pytest.mark.parametrize("shape", ["skewed", "clustered"])
def test_coverage_of_means(shape):
    rng = np.random.default_rng(9)
    repetitions, covered = 600, 0
    prompts = np.repeat(np.arange(120), 2)
    for _ in range(repetitions):
        per_prompt = rng.gamma(2, size=120)
        if shape == "clustered":
            interval = mean_interval(
                np.repeat(per_prompt, 2) + rng.normal(size=240), prompts, num_resamples=699
            )
        else:
            interval = mean_interval(per_prompt, num_resamples=699)
        covered += interval.low <= 2 <= interval.high
    assert covered / repetitions == pytest.approx(0.95, abs=0.02)


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "values has no rows"),
        (([[1.0]],), r"shape \(n,\), got shape \(1, 1\)"),
        (([1.0, np.nan, np.nan],), r"nan in 2 of 3 rows \(first: \[1, 2\]\)"),
        (([1.0, np.inf],), r"infinite in rows \[1\]"),
        (([1.0, 2.0], ["a"]), "prompt_ids 1, the values 2"),
        (([1.0, 2.0], [["a"], ["b"]]), "prompt_ids must be one id per row"),
        (([3.0],), "one prompt gives a mean but no interval"),
        (([3.0, 4.0], ["a", "a"]), "one prompt gives a mean but no interval"),
        (([1.0, 2.0], None, 95), "confidence must be between 0 and 1"),
        (([0.5, 2.0], None, 0.95, (0, 1)), r"values run from 0.5 to 2, beyond the bounds \(0, 1\)"),
    ],
)
def test_bad_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mean_interval(*arguments)
