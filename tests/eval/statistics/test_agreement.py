"""Agreement and kappa: textbook tables, statsmodels, plain loops, and coverage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from statsmodels.stats.inter_rater import cohens_kappa, fleiss_kappa

from eval.statistics.agreement import agreement, human_ceiling

nan = float("nan")


def from_table(table, verdicts=(0.0, 0.5, 1.0)):
    """Two lists of scores with `table[i][j]` rows of verdicts (i, j)."""
    rows = [(verdicts[i], verdicts[j]) for i, j in np.ndindex(*np.shape(table)) for _ in range(table[i][j])]
    return np.array(rows).T


def noisy(rng, truth, error):
    """Each verdict replaced, with probability `error`, by one drawn evenly from the three."""
    return np.where(rng.random(truth.shape) < error, rng.choice([0, 0.5, 1], size=truth.shape), truth)


# --- two judges -------------------------------------------------------------------------------------------


def test_a_textbook_table():
    # 20 + 15 of 50 agree; p_e = (25 x 30 + 25 x 20) / 50^2 = 0.5; kappa = 0.2 / 0.5.
    result = agreement(*from_table([[20, 5], [10, 15]], (0.0, 1.0)))
    assert (result.agreement, result.chance, result.kappa) == pytest.approx((0.7, 0.5, 0.4))
    assert (result.low, result.high) == pytest.approx((0.5625, 0.8090), abs=1e-3)  # Wilson, 35 of 50
    assert result.n == 50


@pytest.mark.parametrize(
    "table", [[[60, 9, 12], [7, 20, 9], [14, 3, 80]], [[5, 1, 90], [0, 2, 4], [40, 8, 60]]]
)
def test_kappa_and_its_interval_are_those_of_statsmodels(table):
    result, expected = agreement(*from_table(table)), cohens_kappa(np.array(table))
    assert result.kappa == pytest.approx(expected.kappa)
    limits = np.array([result.kappa_low, result.kappa_high])
    assert limits == pytest.approx(np.array([expected.kappa_low, expected.kappa_upp]), abs=2e-3)


def test_shared_scores_are_verdicts():
    result = agreement([0.75, 0.25, 0.5, 1, 0.9], [1, 0, 0.5, 0.4, nan])
    assert (result.n, result.undecided) == (4, 1)
    assert result.agreement == 0.75


def test_perfect_agreement_is_not_certain():
    scores = np.array([0.0, 1.0] * 15)
    result = agreement(scores, scores)
    low = 30 / (30 + 3.8415)  # Wilson for 30 of 30
    assert (result.agreement, result.kappa, result.kappa_high) == (1, 1, 1)
    assert result.low == pytest.approx(low, abs=1e-5)
    assert result.kappa_low == pytest.approx((low - 0.5) / 0.5, abs=1e-4)


def test_kappa_of_judges_who_never_differ_is_undefined():
    result = agreement(np.ones(10), np.ones(10))
    assert (result.agreement, result.chance) == (1, 1)
    assert np.isnan([result.kappa, result.kappa_low, result.kappa_high]).all()


def test_judges_change_places():
    rng = np.random.default_rng(0)
    a, b = rng.choice([0, 0.5, 1], size=(2, 60))
    assert agreement(a, b) == agreement(b, a)


def test_more_verdicts_on_the_same_prompts_add_nothing():
    rng = np.random.default_rng(1)
    truth = rng.choice([0.0, 0.5, 1.0], size=80)
    a, b = noisy(rng, truth, 0.3), noisy(rng, truth, 0.3)
    once = agreement(a, b)
    again = agreement(np.tile(a, 5), np.tile(b, 5), np.tile(np.arange(80), 5))
    assert (again.kappa, again.kappa_low, again.kappa_high) == pytest.approx(
        (once.kappa, once.kappa_low, once.kappa_high)
    )
    assert again.high - again.low == pytest.approx(once.high - once.low, rel=0.03)


@pytest.mark.parametrize("rows_per_prompt", [1, 3])
def test_coverage_of_kappa(rows_per_prompt):
    # Both judges miss the truth with probability 0.3, or by prompt with 0 or 0.6. Without a tie: the error leaves
    # 0.85 right, so p_o = 0.85^2 + 0.15^2 = 0.745; by prompt (1 + 0.7^2 + 0.3^2) / 2 = 0.79. p_e = 0.5.
    rng = np.random.default_rng(2)
    repetitions, covered, num_prompts = 1200, 0, 120
    truth_kappa = 0.49 if rows_per_prompt == 1 else 0.58
    prompts = np.repeat(np.arange(num_prompts), rows_per_prompt)
    for _ in range(repetitions):
        size = num_prompts * rows_per_prompt
        truth = rng.integers(0, 2, size)
        error = 0.3 if rows_per_prompt == 1 else np.repeat(rng.choice([0, 0.6], num_prompts), rows_per_prompt)
        a, b = (np.where(rng.random(size) < error, rng.integers(0, 2, size), truth) for _ in range(2))
        result = agreement(a, b, prompts)
        covered += result.kappa_low <= truth_kappa <= result.kappa_high
    assert covered / repetitions == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "scores_1 has no rows"),
        (([1, 0], [1]), "scores_1 2, scores_2 1"),
        (([1, nan], [nan, 1]), "none of 2 comparisons is decided by both"),
        (([1, 2], [1, 0]), r"scores_1 must be in \[0, 1\]"),
        (([1, 0], [1, 0], ["p"]), "prompt_ids 1, the values 2"),
    ],
)
def test_bad_scores_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        agreement(*arguments)


# --- people -----------------------------------------------------------------------------------------------


def labelled(rng, size, judge_error, human_error, annotators=4):
    truth = rng.choice([0.0, 0.5, 1.0], size=size)
    labels = noisy(rng, np.tile(truth[:, None], annotators), human_error)
    labels[:, 2:] = np.where(rng.random((size, annotators - 2)) < 0.4, nan, labels[:, 2:])
    return noisy(rng, truth, judge_error), labels


def test_the_ceiling_equals_plain_loops():
    judge, labels = labelled(np.random.default_rng(3), 60, 0.4, 0.3)
    judge[:5], labels[5:9, 1:] = nan, nan
    with_judge, with_human = [], []
    for verdict, row in zip(judge, labels, strict=True):
        given = [x for x in row if not np.isnan(x)]
        if np.isnan(verdict) or len(given) < 2:
            continue
        with_judge.append(np.mean([x == verdict for x in given]))
        with_human.append(np.mean([x == y for x, y in itertools.combinations(given, 2)]))
    result = human_ceiling(judge, labels)
    assert (result.num_pairs, result.left_out) == (51, 9)
    assert result.judge.value == pytest.approx(np.mean(with_judge))
    assert result.humans.value == pytest.approx(np.mean(with_human))
    assert result.difference.value == pytest.approx(np.mean(with_judge) - np.mean(with_human))
    assert result.difference.low < result.difference.value < result.difference.high


def test_human_kappa_is_that_of_fleiss():
    rng = np.random.default_rng(4)
    labels = noisy(rng, np.tile(rng.choice([0.0, 0.5, 1.0], size=70)[:, None], 3), 0.5)
    counts = np.stack([(labels == v).sum(axis=1) for v in (0, 0.5, 1)], axis=1)
    result = human_ceiling(labels[:, 0], labels)
    assert result.human_kappa == pytest.approx(fleiss_kappa(counts))
    assert result.human_kappa_limits[0] < result.human_kappa < result.human_kappa_limits[1]


def test_with_one_annotator_copied_the_judge_kappa_is_cohens():
    rng = np.random.default_rng(5)
    judge, human = rng.choice([0, 0.5, 1], size=(2, 50))
    result, expected = human_ceiling(judge, np.stack([human, human], axis=1)), agreement(judge, human)
    assert result.judge_kappa == pytest.approx(expected.kappa)
    assert result.judge_kappa_limits == pytest.approx((expected.kappa_low, expected.kappa_high))
    assert (result.humans.value, result.human_kappa) == (1, 1)


def test_a_judge_below_and_above_the_ceiling():
    rng = np.random.default_rng(6)
    worse = human_ceiling(*labelled(rng, 400, 0.9, 0.2))
    better = human_ceiling(*labelled(rng, 400, 0.0, 0.5))
    assert worse.difference.high < 0 < better.difference.low


def test_coverage_of_the_ceiling():
    # At error 0.3 a label is right with 0.7 + 0.1 = 0.8, and 0.1 falls on each wrong verdict: two agree with
    # 0.8^2 + 2 x 0.1^2 = 0.66. The judge errs as the people do, so it stands at the ceiling.
    rng = np.random.default_rng(8)
    repetitions = 600
    inside = np.zeros(5)
    for _ in range(repetitions):
        result = human_ceiling(*labelled(rng, 120, 0.3, 0.3), num_resamples=699)
        kappa = (0.66 - 1 / 3) / (2 / 3)
        limits = (
            (result.judge.low, 0.66, result.judge.high),
            (result.humans.low, 0.66, result.humans.high),
            (result.judge_kappa_limits[0], kappa, result.judge_kappa_limits[1]),
            (result.human_kappa_limits[0], kappa, result.human_kappa_limits[1]),
            (result.difference.low, 0, result.difference.high),
        )
        inside += [low <= value <= high for low, value, high in limits]
    assert inside / repetitions == pytest.approx(np.full(5, 0.95), abs=0.02)


@pytest.mark.parametrize(
    ("judge", "labels", "message"),
    [
        ([1.0], [[1.0]], "at least 2 annotators"),
        ([1.0, 0.0], [[1.0, 0.0]], "judge_scores 2, human_scores 1"),
        ([nan, 1.0], [[1.0, 0.0], [1.0, nan]], "none of 2 pairs has two human labels"),
        ([1.0], [[1.0, 3.0]], r"human_scores must be in \[0, 1\]"),
    ],
)
def test_bad_labels_are_refused(judge, labels, message):
    with pytest.raises(ValueError, match=message):
        human_ceiling(judge, labels)
