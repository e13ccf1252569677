"""Bradley-Terry strengths: by hand, against statsmodels and a plain optimiser, under separation, and coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logit
from statsmodels.genmod.families import Binomial
from statsmodels.genmod.generalized_linear_model import GLM

from eval.statistics.bradley_terry import bradley_terry, elo

nan = float("nan")
NAMES = np.array(["a", "b", "c", "d", "e"])


def games(rng, strengths, size, nu=0.0, prompts=200):
    """Comparisons of random pairs: indices of both, scores, prompts."""
    first = rng.integers(0, len(strengths), size)
    second = (first + rng.integers(1, len(strengths), size)) % len(strengths)
    gap = (np.asarray(strengths)[first] - np.asarray(strengths)[second]) / 2
    won, tied, lost = np.exp(gap), np.full(size, nu), np.exp(-gap)
    draw = rng.random(size) * (won + tied + lost)
    scores = np.where(draw < won, 1.0, np.where(draw < won + tied, 0.5, 0.0))
    return first, second, scores, rng.integers(0, prompts, size)


def in_order(ranking, systems):
    return np.array([ranking.strengths[ranking.systems.index(s)] for s in systems])


# --- strengths --------------------------------------------------------------------------------------------


def test_two_systems_by_hand():
    # 30 to 10: odds of 3, so ln 3 apart, and 400 log10 3 = 190.85 points of Elo.
    ranking = bradley_terry(["x"] * 40, ["y"] * 40, [1] * 30 + [0] * 10, anchor="y")
    assert ranking.systems == ("x", "y")
    assert ranking.strengths == pytest.approx([math.log(3), 0])
    assert elo(ranking.strengths) == pytest.approx([1190.85, 1000], abs=0.01)
    assert elo(ranking.low)[1] == elo(ranking.high)[1] == 1000
    assert ranking.warnings == ()
    centred = bradley_terry(["x"] * 40, ["y"] * 40, [1] * 30 + [0] * 10)
    assert centred.strengths == pytest.approx([math.log(3) / 2, -math.log(3) / 2])


@pytest.mark.parametrize("seed", range(3))
def test_strengths_are_those_of_a_logistic_regression(seed):
    rng = np.random.default_rng(seed)
    first, second, scores, prompts = games(rng, [1.5, 0.5, 0, -0.5, -1.5], 400, nu=0.5)
    scores[:50] = rng.random(50)  # shared scores
    design = np.zeros((400, 5))
    design[np.arange(400), first], design[np.arange(400), second] = 1, -1
    fit = GLM(scores, design[:, 1:], family=Binomial()).fit(tol=1e-12)
    ranking = bradley_terry(NAMES[first], NAMES[second], scores, prompts, anchor="a", num_resamples=2)
    assert in_order(ranking, NAMES) == pytest.approx(np.append(0, fit.params), abs=1e-6)


def test_a_tie_is_half_a_win_by_hand():
    # 40 wins, 40 ties, 10 losses: 60 to 30, odds of 2.
    ranking = bradley_terry(["x"] * 90, ["y"] * 90, [1] * 40 + [0.5] * 40 + [0] * 10, anchor="y")
    assert ranking.strengths[0] == pytest.approx(math.log(60 / 30))


def test_sides_and_order_of_rows_change_nothing():
    rng = np.random.default_rng(3)
    first, second, scores, prompts = games(rng, [1, 0, -1], 200, nu=0.4)
    one = bradley_terry(NAMES[first], NAMES[second], scores, prompts, num_resamples=50)
    flip, shuffle = rng.random(200) < 0.5, rng.permutation(200)
    a, b = np.where(flip, second, first)[shuffle], np.where(flip, first, second)[shuffle]
    flipped = np.where(flip, 1 - scores, scores)[shuffle]
    other = bradley_terry(NAMES[a], NAMES[b], flipped, prompts[shuffle], num_resamples=50)
    assert other.systems == one.systems
    for field in ("strengths", "low", "high"):
        assert getattr(other, field) == pytest.approx(getattr(one, field), abs=1e-7)


def test_a_copy_ranks_beside_its_original():
    # b and its copy meet a and c on the same prompts with the same results: same strength, same limits.
    rng = np.random.default_rng(4)
    prompts = np.tile(np.arange(80), 2)
    opponents = np.repeat(["a", "c"], 80)
    scores = (rng.random(160) < np.repeat([0.4, 0.7], 80)).astype(float)
    ranking = bradley_terry(
        np.repeat(["b", "copy"], 160), np.tile(opponents, 2), np.tile(scores, 2), np.tile(prompts, 2)
    )
    i, j = ranking.systems.index("b"), ranking.systems.index("copy")
    for values in (ranking.strengths, ranking.low, ranking.high):
        assert values[i] == pytest.approx(values[j])


def test_undecided_comparisons_are_left_out_and_counted():
    first, second, scores, prompts = games(np.random.default_rng(5), [1, 0, -1], 150)
    one = bradley_terry(NAMES[first], NAMES[second], scores, prompts, num_resamples=30)
    more = bradley_terry(
        np.append(NAMES[first], ["a", "c"]),
        np.append(NAMES[second], ["b", "b"]),
        np.append(scores, [nan, nan]),
        np.append(prompts, [998, 999]),
        num_resamples=30,
    )
    assert (more.undecided, more.num_comparisons, more.num_prompts) == (2, 150, one.num_prompts)
    assert more.strengths.tolist() == one.strengths.tolist()
    assert more.low.tolist() == one.low.tolist()


# --- intervals --------------------------------------------------------------------------------------------


def test_more_verdicts_on_the_same_prompts_add_nothing():
    first, second, scores, _ = games(np.random.default_rng(6), [0.5, 0, -0.5], 120)
    prompts = np.arange(120)
    once = bradley_terry(NAMES[first], NAMES[second], scores, prompts)
    a, b, tiled, same = (np.tile(x, 9) for x in (NAMES[first], NAMES[second], scores, prompts))
    again = bradley_terry(a, b, tiled, same)
    for field in ("strengths", "low", "high"):
        assert getattr(again, field) == pytest.approx(getattr(once, field), abs=1e-6)
    rows = bradley_terry(a, b, tiled)
    assert (rows.high - rows.low).max() < 0.45 * (once.high - once.low).min()


def test_limits_come_near_those_of_the_likelihood():
    # With every row its own prompt, the bootstrap and the inverse information agree.
    first, second, scores, _ = games(np.random.default_rng(7), [0.8, 0, -0.8], 1500)
    design = np.zeros((1500, 3))
    design[np.arange(1500), first], design[np.arange(1500), second] = 1, -1
    fit = GLM(scores, design[:, 1:], family=Binomial()).fit()
    ranking = bradley_terry(NAMES[first], NAMES[second], scores, anchor="a")
    widths = [ranking.high[ranking.systems.index(s)] - ranking.low[ranking.systems.index(s)] for s in "bc"]
    assert widths == pytest.approx(2 * 1.96 * fit.bse, rel=0.1)


def test_the_ranking_is_a_function_of_its_arguments():
    first, second, scores, prompts = games(np.random.default_rng(8), [0.5, 0, -0.5], 120)
    one, same, other = (
        bradley_terry(NAMES[first], NAMES[second], scores, prompts, num_resamples=50, seed=s)
        for s in (0, 0, 1)
    )
    assert one.low.tolist() == same.low.tolist() != other.low.tolist()


def clustered_games(rng, num_prompts):
    """Each pair of three systems twice on each prompt; the second verdict repeats the first 4 times of 5."""
    first, second = np.array([0, 0, 1]), np.array([1, 2, 2])
    chance = expit(np.array([0.6, 0, -0.6])[first] - np.array([0.6, 0, -0.6])[second])
    one, fresh = (rng.random((2, num_prompts, 3)) < chance).astype(float)
    two = np.where(rng.random((num_prompts, 3)) < 0.8, one, fresh)
    scores = np.concatenate([one.ravel(), two.ravel()])
    prompts = np.tile(np.repeat(np.arange(num_prompts), 3), 2)
    return NAMES[np.tile(first, 2 * num_prompts)], NAMES[np.tile(second, 2 * num_prompts)], scores, prompts


def inside(ranking, truth):
    limits = {s: (low, high) for s, low, high in zip(ranking.systems, ranking.low, ranking.high, strict=True)}
    return np.array([limits[s][0] <= value <= limits[s][1] for s, value in truth.items()])


def test_coverage():
    rng = np.random.default_rng(9)
    truth = {"a": 0.6, "b": 0.0, "c": -0.6}
    covered, by_rows = [], []
    for repetition in range(600):
        a, b, scores, prompts = clustered_games(rng, 80)
        covered.append(inside(bradley_terry(a, b, scores, prompts, num_resamples=250), truth))
        if repetition % 4 == 0:
            by_rows.append(inside(bradley_terry(a, b, scores, num_resamples=250), truth))
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)
    assert np.mean(by_rows) < 0.9


# --- separation -------------------------------------------------------------------------------------------


def test_an_unbeaten_system_gets_a_warning_and_a_finite_strength():
    ranking = bradley_terry(["x"] * 600, ["y"] * 600, [1] * 600, anchor="y")
    (warning,) = ranking.warnings
    assert "separation" in warning and "{x}" in warning and "{y}" in warning
    # 600 of 600: Wilson's lower limit for the rate is 0.9936. The limits must not be tighter, nor end at the estimate.
    assert ranking.low[0] < logit(0.9936) < ranking.strengths[0] < ranking.high[0]
    assert ranking.low[0] > 2
    assert ranking.high[0] < 15


def test_limits_under_separation_are_those_of_the_penalised_likelihood():
    # c never gets anything. The curvature is taken by differences of the penalised log-likelihood in s.
    first = np.repeat([0, 0, 1], 40)
    second = np.repeat([1, 2, 2], 40)
    scores = np.array([1.0] * 22 + [0.5] * 8 + [0.0] * 10 + [1.0] * 80)
    ranking = bradley_terry(NAMES[first], NAMES[second], scores)

    def loss(x):
        gap = x[first] - x[second]
        return np.log1p(np.exp(gap)).sum() - scores @ gap + 0.05 * x @ x

    best = minimize(loss, np.zeros(3), tol=1e-12).x
    steps = 1e-4 * np.eye(3)
    curvature = [
        [sum(i * j * loss(best + i * u + j * v) for i in (1, -1) for j in (1, -1)) / 4e-8 for u in steps]
        for v in steps
    ]
    centre = np.eye(3) - 1 / 3
    error = np.sqrt(np.diag(centre @ np.linalg.inv(curvature) @ centre.T))
    assert in_order(ranking, NAMES[:3]) == pytest.approx(centre @ best, abs=1e-4)
    index = ranking.systems.index("c")
    assert ranking.low[index] == pytest.approx((centre @ best - 1.96 * error)[2], abs=1e-3)
    assert ranking.high[index] == pytest.approx((centre @ best + 1.96 * error)[2], abs=1e-3)


def test_one_lost_game_ends_the_separation():
    ranking = bradley_terry(["x"] * 600, ["y"] * 600, [1] * 599 + [0], anchor="y")
    assert ranking.warnings == ()
    assert ranking.strengths[0] == pytest.approx(math.log(599))
    tied = bradley_terry(["x"] * 600, ["y"] * 600, [1] * 599 + [0.5], anchor="y")
    assert tied.warnings == ()
    assert tied.strengths[0] == pytest.approx(math.log(599.5 / 0.5))


def test_groups_that_never_lose_to_others_are_named():
    # a and b beat each other, as do c and d; a and b never lose to c and d.
    a = ["a", "b", "c", "d", "a", "b"] * 10
    b = ["b", "a", "d", "c", "c", "d"] * 10
    ranking = bradley_terry(a, b, [1] * 60)
    assert "{a, b}, {c, d}" in ranking.warnings[0]
    assert set(ranking.systems[:2]) == {"a", "b"}
    assert np.isfinite([ranking.strengths, ranking.low, ranking.high]).all()
    assert (ranking.low < ranking.strengths).all() and (ranking.strengths < ranking.high).all()


def test_resamples_without_a_loss_stay_finite():
    # Two losses in 60: one resample in seven has none.
    ranking = bradley_terry(["x"] * 60, ["y"] * 60, [1] * 58 + [0] * 2, anchor="y")
    assert ranking.warnings == ()
    assert math.log(58 / 2) < ranking.high[0] < 8


@pytest.mark.parametrize("seed", range(4))
def test_lopsided_results_settle(seed):
    rng = np.random.default_rng(seed)
    first, second, scores, prompts = games(rng, [6, 3, 0, -3, -6], 3000, nu=0.1)
    ranking = bradley_terry(NAMES[first], NAMES[second], scores, prompts, num_resamples=200)
    assert ranking.systems == ("a", "b", "c", "d", "e")
    assert np.isfinite([ranking.low, ranking.high]).all()


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "scores", "options", "message"),
    [
        ([], [], [], {}, "scores has no rows"),
        (["x", "y"], ["y"], [1, 0], {}, "scores 2, systems_a 2, systems_b 1"),
        (["x", "y"], ["y", "y"], [1, 0], {}, "row 1 compares y with itself"),
        (["x", "x"], ["y", "y"], [nan, nan], {}, "all 2 comparisons are undecided"),
        (["x", "x"], ["y", "y"], [1, 0], {"anchor": "z"}, "anchor 'z' is not among the systems: x, y"),
        (
            ["x", "x"],
            ["y", "y"],
            [1, 0],
            {"prompt_ids": ["p", "p"]},
            "all decided comparisons are on one prompt",
        ),
        (["x", "x"], ["y", "y"], [1, 0], {"prompt_ids": ["p"]}, "prompt_ids 1, the values 2"),
        (
            ["x", "x", "u"],
            ["y", "y", "v"],
            [1, 0, 1],
            {},
            r"joins these groups.*u, v \| x, y.*common baseline",
        ),
        (["x", "x", "u"], ["y", "y", "x"], [1, 0, nan], {}, r"joins these groups.*u \| x, y"),
    ],
)
def test_bad_input_is_refused(a, b, scores, options, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry(a, b, scores, **options)
