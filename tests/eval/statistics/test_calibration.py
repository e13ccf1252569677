"""Calibration: values by hand, a loop over mirrored pairs, and models that are calibrated by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq

from eval.statistics.calibration import calibration, expected_calibration_error, fitted_temperature


def calibrated_margins(num_pairs: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    """Margins of drawn size whose sign is right with probability sigmoid(size), then multiplied by `scale`."""
    rng = np.random.default_rng(seed)
    sizes = np.abs(rng.normal(0, 1.5, num_pairs))
    return scale * np.where(rng.random(num_pairs) < 1 / (1 + np.exp(-sizes)), sizes, -sizes)


def test_calibration_by_hand():
    """sigmoid(ln 3) = 3/4: two pairs right and two wrong at confidence 3/4, and one tie at 1/2."""
    third = math.log(3)
    found = calibration([third, third, -third, -third, 0.0], num_bins=2)
    assert found.brier.value == pytest.approx((2 / 16 + 2 * 9 / 16 + 1 / 4) / 5)
    assert found.log_loss.value == pytest.approx((2 * math.log(4 / 3) + 2 * math.log(4) + math.log(2)) / 5)
    # All confidences but one are 3/4, the cut at the median: one bin, 2.5 of 5 right at mean confidence 3.5 / 5.
    assert [(b.n, b.accuracy) for b in found.bins] == [(5, 0.5)]
    assert found.ece == pytest.approx(0.2)


def test_bins_by_hand():
    """Confidences 2/3 (one of two right) and 4/5 (both right)."""
    low, high = math.log(2), math.log(4)
    found = calibration([low, -low, high, high], num_bins=2)
    assert [(b.n, b.accuracy) for b in found.bins] == [(2, 0.5), (2, 1.0)]
    assert [b.confidence for b in found.bins] == pytest.approx([2 / 3, 4 / 5])
    assert found.ece == pytest.approx(0.5 * (2 / 3 - 1 / 2) + 0.5 * (1 - 4 / 5))


def test_ece_equals_a_loop():
    rng = np.random.default_rng(2)
    confidences, correct, bins = rng.random(50), rng.integers(0, 2, 50).astype(float), rng.integers(0, 4, 50)
    expected = 0.0
    for code in range(4):
        inside = [i for i in range(50) if bins[i] == code]
        gap = abs(sum(correct[i] for i in inside) - sum(confidences[i] for i in inside)) / len(inside)
        expected += len(inside) / 50 * gap
    assert expected_calibration_error(confidences, correct, bins) == pytest.approx(expected)


def test_mirrored_pairs_have_the_same_losses():
    margins = np.random.default_rng(3).normal(0.4, 1, 40)
    squares, losses = [], []
    for margin, label in [*((m, 1) for m in margins), *((-m, 0) for m in margins)]:
        probability = 1 / (1 + math.exp(-margin))
        squares.append((probability - label) ** 2)
        losses.append(-math.log(probability if label else 1 - probability))
    found = calibration(margins)
    assert found.log_loss.value == pytest.approx(sum(losses) / 80)
    assert found.brier.value == pytest.approx(sum(squares) / 80)


def test_temperature_by_hand():
    """Three margins of 2 and one of -2: sigmoid(2 / T) = 3/4, so T = 2 / ln 3."""
    temperature, reason = fitted_temperature([2.0, 2.0, 2.0, -2.0])
    assert temperature == pytest.approx(2 / math.log(3), rel=1e-6) and reason is None
    found = calibration([2.0, 2.0, 2.0, -2.0])
    assert found.scaled_ece == pytest.approx(0, abs=1e-7)
    assert found.scaled_log_loss == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert found.scaled_brier == pytest.approx(0.75 / 16 + 0.25 * 9 / 16)


def test_temperature_by_hand_over_prompts():
    """A prompt of three wrong pairs counts as much as one of a right pair: weights 3/4 right, 1/4 wrong."""
    margins, prompts = [2.0, 2.0, 2.0, -2.0, -2.0, -2.0], ["a", "b", "c", "d", "d", "d"]
    assert fitted_temperature(margins, prompts)[0] == pytest.approx(2 / math.log(3), rel=1e-6)
    found = calibration(margins, prompts)
    assert found.temperature == pytest.approx(2 / math.log(3), rel=1e-6)
    assert found.scaled_log_loss == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert fitted_temperature(margins) == (None, fitted_temperature([1.0, -2.0])[1]), "each pair as a prompt"


def test_no_temperature_of_a_grid_has_a_lower_loss():
    rng = np.random.default_rng(5)
    margins, prompts = rng.normal(0.3, 1, 60), rng.integers(0, 9, 60) ** 2 // 8
    found = calibration(margins, prompts)

    def loss(temperature: float) -> float:
        means = []
        for prompt in sorted(set(prompts)):
            own = [m for m, p in zip(margins, prompts, strict=True) if p == prompt]
            means.append(sum(math.log1p(math.exp(-m / temperature)) for m in own) / len(own))
        return sum(means) / len(means)

    assert found.scaled_log_loss == pytest.approx(loss(found.temperature))
    assert found.log_loss.value == pytest.approx(loss(1.0))
    assert all(found.scaled_log_loss <= loss(t) + 1e-9 for t in np.geomspace(0.05, 50, 300))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_temperature_is_the_root_of_the_gradient(scale):
    """d/db mean log sigmoid(b m) = mean m sigmoid(-b m) = 0 at b = 1 / T."""
    margins = np.random.default_rng(4).normal(0.5, 1, 200)
    inverse = brentq(lambda b: float(np.mean(margins / (1 + np.exp(b * margins)))), 1e-3, 50, xtol=1e-12)
    assert fitted_temperature(scale * margins)[0] == pytest.approx(scale / inverse, rel=1e-5)


@pytest.mark.parametrize(
    ("margins", "reason"),
    [
        ([0.0, 0.0], "all margins are 0"),
        ([1.0, -2.0], "not positive on average"),
        ([1.0, 0.0, 2.0], "no margin is wrong"),
    ],
)
def test_no_temperature_gives_the_reason(margins, reason):
    temperature, said = fitted_temperature(margins)
    assert temperature is None and reason in said
    found = calibration(margins)
    assert found.temperature is None and found.scaled_ece is None


def test_a_calibrated_model_is_within_chance():
    found = calibration(calibrated_margins(4000))
    assert found.ece < found.chance_ece_high
    assert found.temperature == pytest.approx(1, abs=0.1)


def test_a_confident_model_is_found_and_scaled():
    found = calibration(calibrated_margins(4000, scale=4.0))
    assert found.ece > 3 * found.chance_ece_high
    assert found.temperature == pytest.approx(4, rel=0.1)
    assert found.scaled_ece < found.chance_ece_high
    assert found.scaled_log_loss < found.log_loss.value


def test_chance_falls_with_the_number_of_pairs():
    few, many = (calibration(calibrated_margins(n)).chance_ece for n in (100, 1600))
    assert many == pytest.approx(few / 4, rel=0.25)


def test_one_prompt_has_no_interval_of_the_loss():
    found = calibration([1.0, -1.0, 2.0], ["a", "a", "a"])
    assert math.isnan(found.log_loss.low) and found.log_loss.value > 0
