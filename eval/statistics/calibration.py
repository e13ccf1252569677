"""Calibration of a reward model: its margins read as Bradley-Terry probabilities, against the labels.

A pair with margin m, the score of the chosen minus that of the rejected response, says that the chosen response is
preferred with probability sigmoid(m). Labels name a response, not an order, so every pair counts in both orders: (m,
preferred) and (-m, not preferred). Both have the same log loss and squared error, and they fold into one confidence
sigmoid(|m|) in [0.5, 1] with the outcome 1 (m > 0), 0 (m < 0) or 0.5 (m = 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit

from eval.statistics.intervals import (
    Interval,
    mean_interval,
    prompt_codes,
    prompt_means,
    rate_interval,
    without_nan,
)
from eval.statistics.pair_accuracy import equal_mass_bins, outcomes

LOG_RANGE = 15.0
"Temperatures are sought within e^-15 to e^15 times the mean size of the margins."


@dataclass(frozen=True)
class ReliabilityBin:
    """A bin of a reliability diagram: its range and mean of confidences, and the share of right pairs."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float
    interval: Interval


@dataclass(frozen=True)
class Calibration:
    """Calibration of n pairs as scored, and after division of the margins by the fitted `temperature`.

    `chance_ece` and `chance_ece_high` are mean and 95% quantile of the ECE of a perfectly calibrated model with these
    confidences and as many independent pairs: an ECE below the latter is no evidence of miscalibration. Brier score and
    log loss average the pairs of a prompt first, and the temperature minimises that log loss; the ECE counts each pair
    once. `temperature` is None where there is no minimum, for the reason in `no_temperature`. The numbers after scaling
    come from the same pairs as the temperature, so they are optimistic.
    """

    n: int
    bins: tuple[ReliabilityBin, ...]
    ece: float
    chance_ece: float
    chance_ece_high: float
    brier: Interval
    log_loss: Interval
    temperature: float | None
    no_temperature: str | None
    scaled_ece: float | None
    scaled_brier: float | None
    scaled_log_loss: float | None


def log_losses(margins: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute -log sigmoid(m) (n,) in nats, the Bradley-Terry loss."""
    return np.logaddexp(0.0, -margins)


def brier_scores(margins: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute (1 - sigmoid(m))^2 (n,). Source: Brier 1950, for one of the two classes."""
    return expit(-margins) ** 2


def expected_calibration_error(
    confidences: NDArray[np.float64], correct: NDArray[np.float64], bins: NDArray[np.intp]
) -> float:
    """Compute sum_b n_b / n |mean outcome - mean confidence| over bins b.

    Args are (n,); `bins` from 0. Source: Naeini et al. 2015; equal-mass bins: Nixon et al. 2019.
    """
    return float(np.abs(np.bincount(bins, weights=correct - confidences)).sum() / len(bins))


def fitted_temperature(
    margins: ArrayLike, prompt_ids: ArrayLike | None = None
) -> tuple[float | None, str | None]:
    """Find T > 0 that minimises the mean of -log sigmoid(m / T); return it, or None and the reason.

    The mean is over prompts, of the means over the pairs of each, as in `Calibration.log_loss`, which therefore never
    rises. It is convex in 1 / T. It has no minimum at T > 0 where no margin is wrong (T -> 0), or where their mean is
    not positive (T -> infinity: they say nothing, or the opposite). Args: margins and prompts (n,), None when each pair
    has its own. Source: Platt 1999; Guo et al. 2017.
    """
    margins = without_nan(margins, "margins")
    codes = prompt_codes(prompt_ids, len(margins))
    if not margins.any():
        return None, "all margins are 0"
    if prompt_means(margins, codes).mean() <= 0:
        return None, "the margins are not positive on average: any temperature is worse than even odds"
    if margins.min() >= 0:
        return None, "no margin is wrong: the lower the temperature, the better"
    centre = -np.log(np.abs(margins).mean())
    found = minimize_scalar(
        lambda log_inverse: prompt_means(log_losses(margins * np.exp(log_inverse)), codes).mean(),
        bounds=(centre - LOG_RANGE, centre + LOG_RANGE),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return float(np.exp(-found.x)), None


def calibration(
    margins: ArrayLike,
    prompt_ids: ArrayLike | None = None,
    num_bins: int = 10,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Calibration:
    """Measure the calibration of margins (n,). Deterministic in its arguments.

    Args:
        margins: score of the chosen minus that of the rejected response (n,).
        prompt_ids: prompt (n,) of each pair; None when each pair has its own.
        num_bins: bins of equally many pairs, in the diagram and in the ECE.
        confidence: level of the intervals, over prompts.
        num_resamples: draws of labels for `chance_ece`.
        seed: seed of these draws.

    Raises ValueError on no pairs, nan or unequal lengths.
    """
    margins = without_nan(margins, "margins")
    codes = prompt_codes(prompt_ids, len(margins))
    confidences, correct = expit(np.abs(margins)), outcomes(margins)
    bins = equal_mass_bins(confidences, num_bins)
    temperature, reason = fitted_temperature(margins, codes)
    scaled = None if temperature is None else margins / temperature
    chance = _chance_eces(confidences, bins, num_resamples, seed)
    return Calibration(
        n=len(margins),
        bins=_reliability(confidences, correct, bins, codes, confidence),
        ece=expected_calibration_error(confidences, correct, bins),
        chance_ece=float(chance.mean()),
        chance_ece_high=float(np.quantile(chance, 0.95)),
        brier=mean_interval(brier_scores(margins), codes, confidence, (0.0, 1.0)),
        log_loss=_mean_interval(log_losses(margins), codes, confidence),
        temperature=temperature,
        no_temperature=reason,
        # Scaling keeps the order of the confidences, and so the bins.
        scaled_ece=None
        if scaled is None
        else expected_calibration_error(expit(np.abs(scaled)), correct, bins),
        scaled_brier=None if scaled is None else float(prompt_means(brier_scores(scaled), codes).mean()),
        scaled_log_loss=None if scaled is None else float(prompt_means(log_losses(scaled), codes).mean()),
    )


def _mean_interval(values: NDArray[np.float64], codes: NDArray[np.intp], confidence: float) -> Interval:
    """Return the interval of an unbounded mean; a value without limits where there is one prompt only."""
    if len(np.unique(codes)) == 1:
        return Interval(float(values.mean()), np.nan, np.nan, 1, "none")
    return mean_interval(values, codes, confidence)


def _reliability(
    confidences: NDArray[np.float64],
    correct: NDArray[np.float64],
    bins: NDArray[np.intp],
    codes: NDArray[np.intp],
    confidence: float,
) -> tuple[ReliabilityBin, ...]:
    rows = []
    for code in range(bins.max() + 1):
        mask = bins == code
        inside, right = confidences[mask], correct[mask]
        interval = rate_interval(right, codes[mask], confidence)
        values = float(inside.min()), float(inside.max()), len(inside), float(inside.mean())
        rows.append(ReliabilityBin(*values, float(right.mean()), interval))
    return tuple(rows)


def _chance_eces(
    confidences: NDArray[np.float64], bins: NDArray[np.intp], num_resamples: int, seed: int
) -> NDArray[np.float64]:
    """Draw the ECE (num_resamples,) of labels that follow the confidences."""
    generator = np.random.default_rng(seed)
    return np.array(
        [
            expected_calibration_error(
                confidences, (generator.random(len(bins)) < confidences).astype(np.float64), bins
            )
            for _ in range(num_resamples)
        ]
    )
