"""Win rates with their bounds, and tests between two systems."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar

from eval.statistics.win_rate import holm, paired_test, win_rate

nan = float("nan")

# --- win rate ---------------------------------------------------------------------------------------------


def test_counts_and_bounds_by_hand():
    # 4 wins (one of them shared), 1 tie, 2 losses, 3 undecided: 4 + 0.5 - 0.25 = 4.25 of 7.
    result = win_rate([1, 1, 1, 0.75, 0.5, 0, 0, nan, nan, nan])
    assert (result.n, result.num_prompts, result.undecided) == (10, 7, 3)
    assert (result.wins, result.ties, result.losses) == (4, 1, 2)
    assert result.rate == pytest.approx(4.25 / 7)
    assert (result.worst_case, result.best_case) == pytest.approx((4.25 / 10, 7.25 / 10))
    assert result.low < result.rate < result.high


def test_each_prompt_counts_once():
    # Prompt a: 1, 0, nan -> 0.5; b: 1 -> 1; c: nan. Lost instead: a 1/3, b 1, c 0; won instead: a 2/3, b 1, c 1.
    result = win_rate([1, 0, nan, 1, nan], list("aaabc"))
    assert (result.n, result.num_prompts, result.undecided) == (5, 2, 2)
    assert result.rate == pytest.approx(0.75)
    assert (result.worst_case, result.best_case) == pytest.approx((4 / 9, 8 / 9))


def test_missing_verdicts_are_not_filled_in():
    scores = np.random.default_rng(0).choice([0.0, 0.5, 1.0], size=50)
    some, more = win_rate(scores), win_rate(np.append(scores, [nan] * 50))
    assert (more.rate, more.low, more.high) == (some.rate, some.low, some.high)
    assert (some.worst_case, some.best_case) == pytest.approx((some.rate, some.rate))
    assert more.worst_case == pytest.approx(some.rate / 2)
    assert more.best_case == pytest.approx(some.rate / 2 + 0.5)
    assert win_rate([*scores.tolist(), *[None] * 50]) == more


def test_the_bounds_hold_whatever_is_missing():
    rng = np.random.default_rng(1)
    prompts = rng.integers(0, 15, 60)
    for _ in range(100):
        complete = rng.choice([0.0, 0.5, 1.0], size=60)
        seen = np.where(rng.random(60) < rng.random() * (1 - 0.9 * complete), nan, complete)
        result, truth = win_rate(seen, prompts), win_rate(complete, prompts).rate
        assert result.worst_case - 1e-12 <= truth <= result.best_case + 1e-12
        assert result.worst_case - 1e-12 <= result.rate <= result.best_case + 1e-12


def test_the_other_side_has_the_mirrored_rate():
    scores = np.append(np.random.default_rng(2).choice([0, 0.25, 0.5, 1], size=70), nan)
    one, other = win_rate(scores), win_rate(1 - scores)
    assert (other.rate, other.low, other.high) == pytest.approx((1 - one.rate, 1 - one.high, 1 - one.low))
    assert (other.worst_case, other.best_case) == pytest.approx((1 - one.best_case, 1 - one.worst_case))
    assert (other.wins, other.losses, other.ties) == (one.losses, one.wins, one.ties)


def test_all_won_of_600():
    result = win_rate(np.ones(600))
    assert (result.low, result.high) == pytest.approx((0.99364, 1.0), abs=1e-5)
    assert result.method == "wilson"


def test_a_wider_confidence_gives_a_wider_interval():
    scores = [1, 0, 0.5, 1, 1, 0, 1]
    narrow, wide = win_rate(scores, confidence=0.8), win_rate(scores, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_inputs_are_not_changed():
    scores, prompts = np.array([1, nan, 0.5]), np.array(["a", "b", "a"])
    before = scores.copy()
    win_rate(scores, prompts)
    paired_test(scores, before, prompts)
    np.testing.assert_array_equal(scores, before)
    assert prompts.tolist() == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "scores has no rows"),
        (([nan, nan],), "all 2 comparisons are undecided.*statuses"),
        (([1, 0, 2],), r"in \[0, 1\].*got 2.0 in row 2"),
        (([1, 0], ["a"]), "prompt_ids 1, the values 2"),
        (([1, 0], None, 1.0), "confidence must be between 0 and 1"),
    ],
)
def test_bad_scores_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        win_rate(*arguments)


# --- paired tests -----------------------------------------------------------------------------------------


def test_five_of_five_by_hand():
    # All 2^5 sign patterns are equally likely; two of them are as extreme.
    result = paired_test([1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 1])
    assert result.p_value == pytest.approx(2 / 32)
    assert (result.better, result.equal, result.worse) == (5, 2, 0)
    assert result.difference == pytest.approx(5 / 7)


def test_binary_scores_give_the_exact_mcnemar_test():
    rng = np.random.default_rng(3)
    for _ in range(5):
        a = (rng.random(25) < 0.7).astype(float)
        b = a.copy()
        b[rng.choice(25, 12, replace=False)] -= 1
        b = np.abs(b)  # 1 - a in 12 rows
        table = [[np.sum((a == x) & (b == y)) for y in (0, 1)] for x in (0, 1)]
        assert paired_test(a, b, num_resamples=2**14).p_value == pytest.approx(
            mcnemar(table, exact=True).pvalue
        )


def test_shared_scores_by_enumeration():
    a = np.array([1, 0.5, 0.75, 1, 0, 0.5, 1, 1])
    b = np.array([0, 0.5, 0.25, 0.5, 0.25, 0, 1, 0.25])
    differences = a - b
    sums = [abs(differences @ signs) for signs in itertools.product((-1, 1), repeat=8)]
    expected = np.mean([s >= abs(differences.sum()) - 1e-9 for s in sums])
    assert paired_test(a, b).p_value == pytest.approx(expected)


def test_sampled_flips_come_near_the_exact_ones():
    rng = np.random.default_rng(4)
    a, b = rng.random(13), rng.random(13)
    exact, sampled = paired_test(a, b, num_resamples=2**13), paired_test(a, b, num_resamples=2**13 - 1)
    assert sampled.p_value == pytest.approx(exact.p_value, abs=0.02)
    assert sampled.p_value != exact.p_value


def test_systems_change_places():
    rng = np.random.default_rng(5)
    a, b = rng.choice([0, 0.5, 1], size=(2, 40))
    one, other = paired_test(a, b), paired_test(b, a)
    assert other.p_value == pytest.approx(one.p_value, abs=0.01)
    assert (other.difference, other.better, other.worse) == (-one.difference, one.worse, one.better)
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low), abs=0.02)


def test_undecided_rows_and_repeated_prompts():
    a, b = [1, 1, nan, 0, 1, 1], [0, 1, 1, nan, 0, 0]
    result = paired_test(a, b, ["p", "q", "q", "r", "s", "s"])
    assert (result.num_prompts, result.undecided) == (3, 2)
    assert (result.better, result.equal, result.worse) == (2, 1, 0)
    assert result.difference == pytest.approx(2 / 3)
    assert result.p_value == pytest.approx(2 / 4)


def test_more_verdicts_on_the_same_prompts_prove_nothing():
    rng = np.random.default_rng(6)
    a, b = rng.choice([0, 0.5, 1], size=(2, 30))
    prompts = np.arange(30)
    once = paired_test(a, b, prompts)
    again = paired_test(np.tile(a, 8), np.tile(b, 8), np.tile(prompts, 8))
    assert (again.p_value, again.low, again.high) == pytest.approx((once.p_value, once.low, once.high))


def test_equal_systems():
    scores = [1, 0, 0.5, 1] * 10
    result = paired_test(scores, scores)
    share = 1 - 0.025 ** (1 / 40)
    assert (result.difference, result.p_value) == (0, 1)
    assert (result.low, result.high) == pytest.approx((-share, share))


def test_level_and_coverage_of_the_paired_test():
    # Both systems have the prompt's own rate; then system 1 gains 0.1 by winning a fifth outright.
    rng = np.random.default_rng(7)
    repetitions, size = 700, 80
    false_alarms = covered = 0
    for _ in range(repetitions):
        own = rng.beta(2, 2, size)
        a, b = rng.binomial(4, own, size=(2, size)) / 4
        false_alarms += paired_test(a, b, num_resamples=499).p_value <= 0.05
        gained = np.where(rng.random(size) < 0.2, 1.0, a)
        interval = paired_test(gained, b, num_resamples=499)
        covered += interval.low <= 0.1 <= interval.high  # 0.2 of what was missing, half on average
    assert false_alarms / repetitions == pytest.approx(0.05, abs=0.02)
    assert covered / repetitions == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "scores_1 has no rows"),
        (([1, 0], [1]), "scores_1 2, scores_2 1"),
        (([1, nan], [nan, 0]), "none of 2 rows is decided for both systems"),
        (([1, 0], [1, -1]), r"scores_2 must be in \[0, 1\]"),
    ],
)
def test_bad_pairs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        paired_test(*arguments)


# --- many tests -------------------------------------------------------------------------------------------


def test_holm_by_hand():
    # 3 x 0.01; 2 x 0.03; 1 x 0.04 would be below the one before it.
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.7, 0.4]).tolist() == pytest.approx([0.8, 0.8])
    assert holm([0.02]).tolist() == pytest.approx([0.02])


def test_holm_equals_a_plain_loop():
    rng = np.random.default_rng(8)
    for size in (4, 9):
        p_values = rng.random(size) ** 3
        expected, floor = np.zeros(size), 0.0
        for rank, index in enumerate(np.argsort(p_values)):
            floor = max(floor, min(1.0, (size - rank) * p_values[index]))
            expected[index] = floor
        np.testing.assert_allclose(holm(p_values), expected)


@pytest.mark.parametrize("p_values", [[], [0.5, nan], [1.2], [[0.1]]])
def test_bad_p_values_are_refused(p_values):
    with pytest.raises(ValueError, match="p_values must be"):
        holm(p_values)


def test_one_prompt_that_differs_proves_nothing():
    result = paired_test([1, 0, 1], [1, 0, 0])
    assert (result.p_value, result.better, result.equal) == (1.0, 1, 2)
