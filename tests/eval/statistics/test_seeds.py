"""Intervals over seeds and prompts: the analysis of variance by loops, and coverage with few seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t as student

from eval.statistics.seeds import seed_difference, seed_interval

nan = float("nan")


def runs(rng, num_seeds, num_prompts, seed_sd, prompt_sd, cell_sd, prompts=None):
    """Scores (S, P) of mean 0.5; `prompts` (P,) are the prompts' own levels when two methods share them."""
    if prompts is None:
        prompts = prompt_sd * rng.normal(size=num_prompts)
    scores = 0.5 + seed_sd * rng.normal(size=(num_seeds, 1)) + prompts
    return scores + cell_sd * rng.normal(size=(num_seeds, num_prompts))


def covers(interval, truth):
    return interval.low <= truth <= interval.high


def test_by_hand():
    # Rows 1 0 1 0, 1 1 1 0, 1 0 0 1: means 2/4, 3/4, 2/4. mean 7/12; V_seed = 2 (1/12)^2 + (1/6)^2 over 3 x 2 = 1/144.
    # Columns 1, 1/3, 2/3, 1/3: V_prompt = (25 + 9 + 1 + 9) / 144 / (4 x 3) = 11 / 432.
    # Total of squares about the mean 7 (5/12)^2 + 5 (7/12)^2 = 35/12; less rows 4 x 1/24 = 1/6, less columns
    # 3 x 11/36 = 11/12, leaves 11/6 over 2 x 3 x 12: V_cell = 11/432 = V_prompt, so prompts add nothing to V_seed.
    # The limits of the cells alone, on 6 degrees, are the wider ones: 2.446912^2 x 11/432 > 4.302653^2 / 144.
    scores = [[1, 0, 1, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    result = seed_interval(scores, bounds=None)
    half = 2.446912 * math.sqrt(11 / 432)
    assert result.value == pytest.approx(7 / 12)
    assert (result.low, result.high) == pytest.approx((7 / 12 - half, 7 / 12 + half))
    assert seed_interval(scores, confidence=0.99).high == 1, "cut at the end of the scale"


def test_seeds_that_differ_by_loops():
    scores = runs(np.random.default_rng(0), 4, 12, 0.5, 0.2, 0.3)
    num_seeds, num_prompts = scores.shape
    mean = sum(scores.ravel()) / scores.size
    rows = [sum(row) / num_prompts for row in scores]
    columns = [sum(column) / num_seeds for column in scores.T]
    rest = sum(
        (scores[s, p] - rows[s] - columns[p] + mean) ** 2
        for s in range(num_seeds)
        for p in range(num_prompts)
    )
    v_cell = rest / ((num_seeds - 1) * (num_prompts - 1)) / scores.size
    v_seed = sum((r - mean) ** 2 for r in rows) / (num_seeds - 1) / num_seeds
    v_prompt = sum((c - mean) ** 2 for c in columns) / (num_prompts - 1) / num_prompts
    assert v_prompt > v_cell
    square = student.isf(0.025, 3) ** 2 * v_seed + student.isf(0.025, 11) ** 2 * (v_prompt - v_cell)
    result = seed_interval(scores, bounds=None)
    half = math.sqrt(square)
    assert (result.low, result.high) == pytest.approx((mean - half, mean + half))


def test_seeds_alone_give_the_t_interval_of_their_means():
    # Prompts and cells hardly vary, so what is left is the textbook interval of three numbers.
    scores = np.array([[0.2], [0.5], [0.8]]) + 1e-6 * np.random.default_rng(1).normal(size=(3, 30))
    result = seed_interval(scores)
    half = 4.302653 * 0.3 / math.sqrt(3)
    assert (result.low, result.high) == pytest.approx((max(0, 0.5 - half), min(1, 0.5 + half)), abs=1e-4)


def test_missing_scores_are_left_out():
    scores = runs(np.random.default_rng(2), 3, 40, 0.05, 0.2, 0.2)
    whole = seed_interval(scores, bounds=None)
    holes = scores.copy()
    holes[0, :4] = holes[2, 7] = holes[:, 20] = nan
    result = seed_interval(holes, bounds=None)
    assert result.num_prompts == 39
    assert result.value == pytest.approx(np.mean([np.nanmean(row) for row in holes]))
    assert result.high - result.low == pytest.approx(whole.high - whole.low, rel=0.25)
    assert np.isnan(holes).sum() == 8


def test_missing_scores_by_loops():
    # The variance written with sums over the scores that are there; each run counts once, however many it has.
    scores = runs(np.random.default_rng(12), 3, 15, 0.3, 0.3, 0.3)
    scores[0, :6] = scores[1, 3] = nan
    there = [[p for p in range(15) if not np.isnan(row[p])] for row in scores]
    means = [sum(scores[s, p] for p in there[s]) / len(there[s]) for s in range(3)]
    v_prompt = v_cell = 0.0
    for p in range(15):
        seeds = [s for s in range(3) if p in there[s]]
        excess = [scores[s, p] - means[s] for s in seeds]
        v_prompt += sum(e / len(there[s]) / 3 for e, s in zip(excess, seeds, strict=True)) ** 2 * 15 / 14
        v_cell += sum((e - sum(excess) / len(excess)) ** 2 for e in excess)
    cell_df = 45 - 7 - 3 - 15 + 1
    v_cell *= sum(1 / len(row) for row in there) / 9 / cell_df
    v_seed = sum((m - sum(means) / 3) ** 2 for m in means) / 2 / 3
    assert v_prompt > v_cell
    half = math.sqrt(student.isf(0.025, 2) ** 2 * v_seed + student.isf(0.025, 14) ** 2 * (v_prompt - v_cell))
    result = seed_interval(scores, bounds=None)
    assert (result.low, result.high) == pytest.approx((sum(means) / 3 - half, sum(means) / 3 + half))


def test_equal_prompts_leave_the_error_of_the_cells():
    # Every column and row has mean 0.5: V_seed = V_prompt = 0, V_cell = 8 x 0.25 / 3 / 8 = 1/12 on 3 degrees.
    result = seed_interval([[1, 0, 1, 0], [0, 1, 0, 1]], bounds=None)
    assert result.high - 0.5 == pytest.approx(3.182446 * math.sqrt(1 / 12), rel=1e-6)


def test_order_and_unit_change_nothing():
    rng = np.random.default_rng(3)
    scores = runs(rng, 4, 30, 0.1, 0.2, 0.2)
    one = seed_interval(scores, bounds=None)
    other = seed_interval(3 - 2 * scores[rng.permutation(4)][:, rng.permutation(30)], bounds=None)
    assert (other.value, other.low, other.high) == pytest.approx(
        (3 - 2 * one.value, 3 - 2 * one.high, 3 - 2 * one.low)
    )


def test_no_variation_is_not_certainty():
    result = seed_interval(np.ones((3, 50)))
    assert result.low == pytest.approx(0.025 ** (1 / 50))
    assert result.high == 1
    unbounded = seed_interval(np.zeros((3, 50)), bounds=None)
    assert (unbounded.low, unbounded.high) == (0, 0)


# Spreads of seeds, prompts and cells: seeds that do not matter, that matter as much as the prompts, that decide.
SPREADS = [
    (seed, prompt, cell)
    for seed in (0.0, 0.01, 0.03, 0.1)
    for prompt, cell in ((0.05, 0.45), (0.3, 0.3), (0.2, 0.1))
]


def coverage(
    num_seeds: int, sds: tuple[float, float, float], num_prompts: int, times: int, seed: int
) -> float:
    rng = np.random.default_rng(seed)
    draws = (runs(rng, num_seeds, num_prompts, *sds) for _ in range(times))
    return float(np.mean([covers(seed_interval(scores, bounds=None), 0.5) for scores in draws]))


@pytest.mark.parametrize("sds", [(0.0, 0.3, 0.3), (0.03, 0.3, 0.3), (0.1, 0.2, 0.3)])
@pytest.mark.parametrize(("num_seeds", "most"), [(2, 0.995), (3, 0.985), (5, 0.975)])
def test_coverage(num_seeds, most, sds):
    """Never below what is promised; above it where few seeds have to stand for all."""
    assert 0.935 <= coverage(num_seeds, sds, 100, 1200, seed=4) <= most


@pytest.mark.slow
@pytest.mark.parametrize("sds", SPREADS, ids=str)
@pytest.mark.parametrize("num_prompts", [20, 200])
@pytest.mark.parametrize(("num_seeds", "most"), [(2, 0.99), (3, 0.985), (5, 0.98), (10, 0.97)])
def test_coverage_over_all_spreads(num_seeds, most, num_prompts, sds):
    """The figures of the docstring; 5000 draws have a standard error of 0.3 points."""
    covered = coverage(num_seeds, sds, num_prompts, 5000, seed=1)
    print(f"seeds {num_seeds}, prompts {num_prompts}, spreads {sds}: {covered:.1%}")
    assert 0.94 <= covered <= most + 0.01


def test_the_hierarchical_bootstrap_is_too_narrow_when_runs_differ():
    rng = np.random.default_rng(6)
    covered, bootstrap = [], []
    for _ in range(500):
        scores = runs(rng, 3, 100, 0.1, 0.2, 0.3)
        covered.append(covers(seed_interval(scores, bounds=None), 0.5))
        seeds = rng.multinomial(3, np.full(3, 1 / 3), size=300) / 3
        prompts = rng.multinomial(100, np.full(100, 0.01), size=300) / 100
        low, high = np.quantile(((seeds @ scores) * prompts).sum(axis=1), [0.025, 0.975])
        bootstrap.append(low <= 0.5 <= high)
    assert np.mean(covered) > 0.935
    assert np.mean(bootstrap) < 0.88


def test_coverage_with_missing_binary_scores():
    rng = np.random.default_rng(6)
    covered = []
    for _ in range(1500):
        rates = np.clip(runs(rng, 5, 150, 0.05, 0.2, 0), 0, 1)
        scores = np.where(rng.random((5, 150)) < 0.1, nan, rng.random((5, 150)) < rates)
        covered.append(covers(seed_interval(scores), 0.5))
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


# --- two methods ------------------------------------------------------------------------------------------


def test_prompts_are_paired_and_seeds_are_not():
    rng = np.random.default_rng(7)
    prompts = rng.normal(size=60)
    a, b = (runs(rng, 5, 60, 0.02, 0, 0.05, prompts) for _ in range(2))
    paired = seed_difference(a, b)
    assert paired.difference == pytest.approx(a.mean() - b.mean())
    alone = seed_interval(a, bounds=None)
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)
    shuffled = seed_difference(a, b[rng.permutation(5)])
    assert (shuffled.low, shuffled.high) == pytest.approx((paired.low, paired.high))
    unpaired = seed_difference(a, b[:, rng.permutation(60)])
    assert unpaired.high - unpaired.low > 3 * (paired.high - paired.low)


def test_methods_change_places():
    rng = np.random.default_rng(8)
    a, b = runs(rng, 3, 40, 0.1, 0.2, 0.2), runs(rng, 5, 40, 0.05, 0.2, 0.2)
    one, other = seed_difference(a, b), seed_difference(b, a)
    assert (other.difference, other.low, other.high) == pytest.approx((-one.difference, -one.high, -one.low))
    assert other.p_value == pytest.approx(one.p_value)


def test_the_p_value_is_the_level_at_which_the_interval_reaches_zero():
    rng = np.random.default_rng(9)
    a, b = runs(rng, 4, 40, 0.1, 0.2, 0.2) + 0.2, runs(rng, 4, 40, 0.1, 0.2, 0.2)
    p_value = seed_difference(a, b).p_value
    edge = seed_difference(a, b, confidence=1 - p_value)
    assert min(abs(edge.low), abs(edge.high)) == pytest.approx(0, abs=1e-9)


def level_and_coverage(num_seeds: tuple[int, int], seed_sd: float, times: int) -> tuple[float, float]:
    """Share of draws with p <= 0.05 where the methods are equal, and of intervals that hold a difference of 0.2."""
    rng = np.random.default_rng(10)
    alarms, covered = [], []
    for _ in range(times):
        prompts = 0.3 * rng.normal(size=120)
        a, b = (runs(rng, seeds, 120, seed_sd, 0, 0.3, prompts) for seeds in num_seeds)
        b = b + 0.15 * rng.normal(size=120)  # the methods find different prompts hard
        alarms.append(seed_difference(a, b).p_value <= 0.05)
        covered.append(covers(seed_difference(a + 0.2, b), 0.2))
    return float(np.mean(alarms)), float(np.mean(covered))


@pytest.mark.parametrize("seed_sd", [0.0, 0.05])
def test_level_and_coverage_of_the_difference(seed_sd):
    """Fewer false alarms than allowed, never more: no method has less than the t of its own seeds."""
    alarms, covered = level_and_coverage((4, 4), seed_sd, 800)
    assert 0.005 < alarms < 0.065 and 0.935 < covered < 0.99


@pytest.mark.slow
@pytest.mark.parametrize("seed_sd", [0.0, 0.02, 0.05, 0.2])
@pytest.mark.parametrize("num_seeds", [(2, 2), (2, 5), (3, 3), (5, 5), (10, 10)], ids=str)
def test_level_and_coverage_of_the_difference_over_all_spreads(num_seeds, seed_sd):
    alarms, covered = level_and_coverage(num_seeds, seed_sd, 3000)
    print(f"seeds {num_seeds}, spread {seed_sd}: level {alarms:.1%}, coverage {covered:.1%}")
    assert alarms <= 0.06 and covered >= 0.94


def test_the_difference_by_hand():
    """Seeds that differ over prompts and cells that hardly do; 2 seeds beside 4. t: 12.706205 (1), 3.182446 (3)."""
    noise = 1e-7 * np.random.default_rng(16).normal(size=(4, 30))
    few, many = np.array([[0.0], [1.0]]) + noise[:2], np.array([[0.0], [2.0], [0.0], [2.0]]) + noise
    v_few, v_many = 0.5 / 2, (4 / 3) / 4
    welch_df = (v_few + v_many) ** 2 / (v_few**2 / 1 + v_many**2 / 3)
    welch = student.isf(0.025, welch_df) ** 2 * (v_few + v_many)
    square = max(welch, 12.706205**2 * v_few, 3.182446**2 * v_many)
    assert square > 1.5 * welch, "the two seeds decide"
    result = seed_difference(few, many)
    assert result.high - result.difference == pytest.approx(math.sqrt(square), rel=1e-5)
    assert result.difference == pytest.approx(-0.5)


def test_prompts_that_one_method_lacks_are_left_out():
    rng = np.random.default_rng(11)
    a, b = runs(rng, 3, 20, 0.1, 0.2, 0.2), runs(rng, 3, 20, 0.1, 0.2, 0.2)
    holes = a.copy()
    holes[:, [3, 9]] = nan
    assert seed_difference(holes, b) == seed_difference(np.delete(a, [3, 9], 1), np.delete(b, [3, 9], 1))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([], r"\(seeds, prompts\) with at least one score, got shape \(0,\)"),
        ([[0.5, 0.6]], "scores has one seed.*eval.statistics.win_rate"),
        ([[0.5], [0.6]], "scores has one prompt"),
        ([[0.5, 0.6], [nan, nan]], r"seeds \[1\] of scores have no decided score"),
        ([[1, nan, 0, nan], [nan, 1, nan, 0]], "share no prompts"),
        ([[1, 2], [0, 1]], r"scores must be in \[0.0, 1.0\]"),
        ([[1, math.inf], [0, 1]], "infinite"),
    ],
)
def test_bad_scores_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        seed_interval(scores)


def test_methods_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="scores_1 has 3 prompts but scores_2 has 2"):
        seed_difference(np.ones((2, 3)), np.ones((2, 2)))
    with pytest.raises(ValueError, match="scores_2 has one seed"):
        seed_difference(np.eye(3), np.ones((1, 3)))
    with pytest.raises(ValueError, match="no score varies"):
        seed_difference(np.ones((2, 3)), np.zeros((2, 3)))


def test_p_values_at_the_ends():
    rng = np.random.default_rng(15)
    a = runs(rng, 3, 40, 0.1, 0.2, 0.2)
    assert seed_difference(a, a).p_value == 1.0
    far = seed_difference(a + 1e9, a)
    assert 0 < far.p_value < 1e-12 and far.difference == pytest.approx(1e9)
