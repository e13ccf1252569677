"""The length-controlled win rate: its point against a plain optimiser, its interval against refits, its warnings."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logit

from eval.statistics.length_control import length_controlled_win_rate

nan = float("nan")


def judged(rng, size, theta, phi, shift=0.0):
    """Scores of 0 and 1 and lengths around 900; `shift` moves a's length, in standard deviations."""
    longer = np.round(rng.normal(40 * shift, 40, size))
    scores = (rng.random(size) < expit(theta + phi * np.tanh(longer / 40))).astype(float)
    return scores, 900 + longer, np.full(size, 900.0)


def refits(scores, longer, weights):
    """(theta, phi) by Newton's method for every row of `weights` (B, n); tanh(d / sd) with each sample's own sd."""
    mean = (weights * longer).sum(axis=1, keepdims=True) / weights.sum(axis=1, keepdims=True)
    sd = np.sqrt((weights * (longer - mean) ** 2).sum(axis=1) / weights.sum(axis=1))
    x = np.tanh(longer / sd[:, None])
    theta, phi = np.zeros((2, len(weights)))
    for _ in range(25):
        p = expit(theta[:, None] + phi[:, None] * x)
        g0, g1 = (weights * (scores - p)).sum(axis=1), (weights * (scores - p) * x).sum(axis=1)
        w = weights * p * (1 - p)
        h00, h01, h11 = w.sum(axis=1), (w * x).sum(axis=1), (w * x * x).sum(axis=1)
        determinant = h00 * h11 - h01**2
        theta, phi = (
            theta + (h11 * g0 - h01 * g1) / determinant,
            phi + (h00 * g1 - h01 * g0) / determinant,
        )
    return theta, phi


def test_the_point_is_the_maximum_of_the_likelihood():
    rng = np.random.default_rng(0)
    scores, a, b = judged(rng, 300, 0.5, 1.2, 0.4)
    scores[:40] = 0.25
    x = np.tanh((a - b) / np.std(a - b))

    def loss(parameters):
        p = expit(parameters[0] + parameters[1] * x)
        return -(scores * np.log(p) + (1 - scores) * np.log1p(-p)).sum()

    best = minimize(loss, [0, 0], tol=1e-10).x
    result = length_controlled_win_rate(scores, a, b)
    assert result.rate == pytest.approx(expit(best[0]), abs=1e-5)
    assert result.slope == pytest.approx(best[1], abs=1e-4)
    assert result.raw_rate == pytest.approx(scores.mean())


def test_the_interval_is_that_of_the_model_at_equal_length():
    # The sandwich (X'WX)^-1 (sum e_i^2 x_i x_i') (X'WX)^-1 n / (n - 2), written out.
    scores, a, b = judged(np.random.default_rng(1), 250, 0.4, 1.0, 0.3)
    result = length_controlled_win_rate(scores, a, b)
    design = np.stack([np.ones(250), np.tanh((a - b) / np.std(a - b))], axis=1)
    p = expit(logit(result.rate) + result.slope * design[:, 1])
    bread = np.linalg.inv(sum(q * (1 - q) * np.outer(row, row) for q, row in zip(p, design, strict=True)))
    meat = sum((y - q) ** 2 * np.outer(row, row) for y, q, row in zip(scores, p, design, strict=True))
    error = np.sqrt((bread @ meat @ bread)[0, 0] * 250 / 248)
    expected = expit(logit(result.rate) + np.array([-1.96, 1.96]) * error)
    assert (result.low, result.high) == pytest.approx(tuple(expected), abs=1e-4)
    assert result.method == "glm_hc1"


def test_the_interval_is_as_wide_as_refits_vary():
    rng = np.random.default_rng(2)
    scores, a, b = judged(rng, 600, 0.3, 1.5, 0.5)
    result = length_controlled_win_rate(scores, a, b)
    weights = rng.multinomial(600, np.full(600, 1 / 600), size=1500).astype(float)
    theta, _ = refits(scores, a - b, weights)
    refit_error = expit(theta).std()
    fitted = expit(logit(result.rate) + result.slope * np.tanh((a - b) / np.std(a - b)))
    too_small = fitted.std() / np.sqrt(600)  # the standard error of the mean of fitted probabilities
    assert (result.high - result.low) / (2 * 1.96) == pytest.approx(refit_error, rel=0.08)
    assert too_small < 0.6 * refit_error


def test_a_judge_of_length_alone_is_seen_through():
    scores, a, b = judged(np.random.default_rng(3), 1500, 0.0, 3.0, 0.8)
    result = length_controlled_win_rate(scores, a, b)
    assert result.raw_rate > 0.75
    assert result.low < 0.5 < result.high
    assert result.rate == pytest.approx(0.5, abs=0.06)
    assert result.slope_low > 2


def test_lengths_that_do_not_matter_change_little():
    scores, a, b = judged(np.random.default_rng(4), 2000, 0.6, 0.0)
    result = length_controlled_win_rate(scores, a, b)
    assert result.rate == pytest.approx(result.raw_rate, abs=0.01)
    assert result.slope_low < 0 < result.slope_high
    assert result.warnings == ()


def test_sides_units_and_undecided_rows():
    scores, a, b = judged(np.random.default_rng(5), 200, 0.4, 1.0, 0.2)
    one = length_controlled_win_rate(scores, a, b)
    other = length_controlled_win_rate(1 - scores, b, a)
    assert (other.rate, other.low, other.high) == pytest.approx((1 - one.rate, 1 - one.high, 1 - one.low))
    assert other.slope == pytest.approx(one.slope)
    assert other.longer_share == pytest.approx(1 - one.longer_share)
    characters = length_controlled_win_rate(scores, 4 * a, 4 * b)
    assert (characters.rate, characters.low) == pytest.approx((one.rate, one.low))
    missing = length_controlled_win_rate(
        np.append(scores, [nan] * 9), np.append(a, [9e9] * 9), np.append(b, [0] * 9)
    )
    assert (missing.rate, missing.high, missing.undecided, missing.n) == (one.rate, one.high, 9, 209)


def test_more_verdicts_on_the_same_prompts_add_nothing():
    scores, a, b = judged(np.random.default_rng(6), 200, 0.4, 1.0, 0.2)
    once = length_controlled_win_rate(scores, a, b)
    again = length_controlled_win_rate(*(np.tile(x, 6) for x in (scores, a, b, np.arange(200))))
    assert again.method == "glm_clustered"
    assert again.rate == pytest.approx(once.rate)
    assert again.high - again.low == pytest.approx(once.high - once.low, rel=0.01)
    rows = length_controlled_win_rate(*(np.tile(x, 6) for x in (scores, a, b)))
    assert rows.high - rows.low < 0.45 * (once.high - once.low)


@pytest.mark.parametrize(("shift", "warned"), [(0, False), (0.5, False), (2.5, True), (-2.5, True)])
def test_extrapolation_is_said(shift, warned):
    result = length_controlled_win_rate(*judged(np.random.default_rng(7), 400, 0.2, 0.5, shift))
    assert any("little overlap in length" in note for note in result.warnings) == warned


def test_responses_that_are_never_shorter_are_no_overlap():
    rng = np.random.default_rng(8)
    result = length_controlled_win_rate(
        rng.integers(0, 2, 300), 100 + rng.exponential(50, 300), np.full(300, 100)
    )
    assert result.near_share > 0.15
    assert result.longer_share == 1
    assert "little overlap" in result.warnings[0]


def test_two_heaps_of_lengths_are_no_overlap():
    rng = np.random.default_rng(8)
    a = np.where(rng.random(300) < 0.5, 100.0, 300.0) + rng.normal(size=300)
    result = length_controlled_win_rate((rng.random(300) < 0.5).astype(float), a, np.full(300, 200.0))
    assert result.near_share == 0
    assert result.longer_share == pytest.approx(0.5, abs=0.1)
    assert "little overlap" in result.warnings[0]


def test_all_won_is_not_certain():
    _, a, b = judged(np.random.default_rng(9), 600, 0, 0)
    for scores, sign in ((np.ones(600), 1), (np.zeros(600), -1)):
        result = length_controlled_win_rate(scores, a, b)
        low, high = (result.low, result.high) if sign == 1 else (1 - result.high, 1 - result.low)
        assert 0.98 < low < 0.9936  # no tighter than Wilson's 0.9936
        assert 0.9936 < high < 1
        assert result.method == "glm_ridge"
        assert "no maximum" in result.warnings[0]
        again = length_controlled_win_rate(*(np.tile(x, 6) for x in (scores, a, b, np.arange(600))))
        assert (again.low, again.high) == pytest.approx((result.low, result.high))  # prompts, not rows


def test_length_that_separates_gives_a_finite_estimate():
    # Longer always wins, except in one of the cases: then there is no separation.
    a, b = np.arange(100.0, 200.0), np.full(100, 149.5)
    scores = (a > b).astype(float)
    result = length_controlled_win_rate(scores, a, b)
    assert result.method == "glm_ridge"
    assert np.isfinite([result.rate, result.low, result.high, result.slope]).all()
    assert result.rate == pytest.approx(0.5, abs=0.02)
    assert result.slope > 5
    scores[[10, 80]] = scores[[80, 10]]
    assert length_controlled_win_rate(scores, a, b).method == "glm_hc1"
    ties = np.where(a == 150, 0.5, (a > b).astype(float))
    assert length_controlled_win_rate(ties, a, b).method == "glm_ridge"


def test_equal_lengths_leave_the_plain_rate():
    scores = np.array([1.0] * 30 + [0.0] * 20)
    result = length_controlled_win_rate(scores, np.full(50, 70), np.full(50, 70))
    assert result.rate == pytest.approx(0.6)
    error = np.sqrt(50 / 49 / (50 * 0.6 * 0.4))  # of the log-odds
    assert result.low == pytest.approx(expit(logit(0.6) - 1.96 * error), abs=1e-4)
    assert np.isnan(result.slope)
    assert result.warnings == ()


def test_one_share_everywhere_is_not_certain():
    # A judge of slots: half of every comparison goes to either side. As many wins and losses have an error of
    # sqrt(1/4 / (n + 1)) in the rate, an added tie included; a robust covariance would be zero.
    rng = np.random.default_rng(13)
    for a, b in ((rng.integers(1, 50, 100), rng.integers(1, 50, 100)), (np.full(100, 5), np.full(100, 5))):
        result = length_controlled_win_rate(np.full(100, 0.5), a, b)
        assert result.rate == pytest.approx(0.5) and result.method == "glm_ridge"
        half = 1 / (1 + np.exp(-1.96 * 2 / np.sqrt(101))) - 0.5
        assert result.high - 0.5 == pytest.approx(half, rel=0.05)
        assert "every decided comparison has the score 0.5" in " ".join(result.warnings)


def test_verdicts_on_one_prompt_are_no_sample_of_prompts():
    rng = np.random.default_rng(14)
    scores, a, b = rng.integers(0, 2, 90), rng.integers(1, 50, 90), rng.integers(1, 50, 90)
    with pytest.raises(ValueError, match="on 9 prompts; length control needs at least 10 prompts"):
        length_controlled_win_rate(scores, a, b, np.arange(90) % 9)
    assert length_controlled_win_rate(scores, a, b, np.arange(90) % 10).method == "glm_clustered"


@pytest.mark.parametrize(("theta", "phi", "shift"), [(0.3, 1.5, 0.5), (1.5, -1.0, -0.8)])
def test_coverage(theta, phi, shift):
    rng = np.random.default_rng(10)
    repetitions, covered, too_narrow = 700, 0, 0
    for _ in range(repetitions):
        scores, a, b = judged(rng, 200, theta, phi, shift)
        result = length_controlled_win_rate(scores, a, b)
        covered += result.low <= expit(theta) <= result.high
        fitted = expit(logit(result.rate) + result.slope * np.tanh((a - b) / np.std(a - b)))
        too_narrow += abs(result.rate - expit(theta)) <= 1.96 * fitted.std() / np.sqrt(200)
    assert covered / repetitions == pytest.approx(0.95, abs=0.02)
    assert too_narrow / repetitions < 0.75


@pytest.mark.parametrize(
    ("scores", "a", "b", "message"),
    [
        ([], [], [], "scores has no rows"),
        ([1] * 20, [5] * 19, [5] * 20, "scores 20, length_a 19, length_b 20"),
        ([1] * 20, [5] * 20, [nan] * 20, "length_b is nan in 20 of 20 rows"),
        ([1] * 20, [5] * 20, [-1] * 20, "must be >= 0"),
        ([1] * 9 + [nan] * 11, [5] * 20, [6] * 20, "^9 of 20 comparisons are decided, on 9 prompts"),
        ([1, 0] * 10, [5] * 20, [6] * 20, "length_a - length_b is -1 in every comparison"),
    ],
)
def test_bad_input_is_refused(scores, a, b, message):
    with pytest.raises(ValueError, match=message):
        length_controlled_win_rate(scores, a, b)


@pytest.mark.parametrize("sign", [1, -1])
def test_lengths_that_are_far_apart_everywhere_have_no_rate_at_equal_length(sign):
    """d runs from 34 to 38 with a deviation near 1: tanh(d / sd) is 1 everywhere, and nothing is known at d = 0."""
    far = np.tile([34, 36, 36, 36, 38], 8)
    longer, shorter = (100 + far, np.full(40, 100))[::sign]
    scores = np.tile([1, 0, 0, 0, 0, 1, 1, 0], 5)
    with pytest.raises(ValueError, match="2 deviations or more away from 100%"):
        length_controlled_win_rate(scores, longer, shorter)
    one_near = np.where(np.arange(40) < 1, shorter + sign, longer)
    with pytest.raises(ValueError, match="away from 98%"):
        length_controlled_win_rate(scores, one_near, shorter)
    many_near = np.where(np.arange(40) < 36, shorter + sign, longer)
    assert 0 < length_controlled_win_rate(scores, many_near, shorter).rate < 1
