"""Intervals for means over prompts, and the input checks that all the statistics share.

Prompts are the random draws, so they are the unit of every interval: the rows of one prompt are averaged first, and
each prompt counts once. More verdicts on the same prompts never narrow an interval by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

BATCH_ELEMENTS = 4_000_000  # numbers held at once by a resampling loop


@dataclass(frozen=True)
class Interval:
    """A mean over `num_prompts` prompts, its confidence limits, and their method."""

    value: float
    low: float
    high: float
    num_prompts: int
    method: str


def checked_values(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """Return `values` as float64 (n,); nan is allowed. Raises ValueError on no rows, infinities or another shape."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one number per row, shape (n,), got shape {array.shape}")
    if len(array) == 0:
        raise ValueError(f"{name} has no rows; there is nothing to measure, so collect some first")
    if np.isinf(array).any():
        rows = np.flatnonzero(np.isinf(array))[:5].tolist()
        raise ValueError(f"{name} is infinite in rows {rows}; find out what went wrong there")
    return array


def checked_scores(scores: ArrayLike, name: str = "scores") -> NDArray[np.float64]:
    """Return scores as float64 (n,): 1 won, 0 lost, between them shared, nan (or None) undecided.

    Raises ValueError for other values.
    """
    array = checked_values(scores, name)
    outside = np.flatnonzero((array < 0) | (array > 1))
    if len(outside):
        raise ValueError(
            f"{name} must be in [0, 1] (1 won, 0 lost, nan undecided), got {array[outside[0]]} in row {outside[0]}"
        )
    return array


def without_nan(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """Return `checked_values` of a quantity that is always defined. Raises ValueError naming the nan rows."""
    array = checked_values(values, name)
    nan_rows = np.flatnonzero(np.isnan(array))
    if len(nan_rows):
        raise ValueError(
            f"{name} is nan in {len(nan_rows)} of {len(array)} rows (first: {nan_rows[:5].tolist()}); "
            "find out why, or leave these rows out and report their number"
        )
    return array


def checked_confidence(confidence: float) -> float:
    """Return `confidence`. Raises ValueError unless it is strictly between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, such as 0.95, got {confidence}")
    return confidence


def same_rows(num_rows: dict[str, int]) -> None:
    """Raise ValueError, with the number of rows of each name, unless all are equal."""
    if len(set(num_rows.values())) > 1:
        counts = ", ".join(f"{name} {number}" for name, number in num_rows.items())
        raise ValueError(f"unequal numbers of rows: {counts}; give one of each per row, in one order")


def prompt_codes(prompt_ids: ArrayLike | None, num_rows: int) -> NDArray[np.intp]:
    """Encode prompts as integers 0, 1, ... (n,); None means that every row is its own prompt.

    Raises ValueError when the number of ids is not `num_rows`.
    """
    if prompt_ids is None:
        return np.arange(num_rows)
    ids = np.asarray(prompt_ids)
    if ids.ndim != 1:
        raise ValueError(f"prompt_ids must be one id per row, shape (n,), got shape {ids.shape}")
    same_rows({"prompt_ids": len(ids), "the values": num_rows})
    return np.unique(ids, return_inverse=True)[1]


def prompt_means(values: NDArray[np.float64], codes: NDArray[np.intp]) -> NDArray[np.float64]:
    """Average the non-nan rows of each prompt; prompts without such a row are dropped.

    `values` (n,) or (n, k), where a nan drops the whole row.
    """
    columns = values.reshape(len(values), -1)
    decided = ~np.isnan(columns).any(axis=1)
    _, codes = np.unique(codes[decided], return_inverse=True)
    counts = np.bincount(codes)
    sums = np.stack([np.bincount(codes, weights=column) for column in columns[decided].T], axis=1)
    means = sums / counts[:, None]
    return means if values.ndim == 2 else means[:, 0]


def _is_constant(means: NDArray[np.float64]) -> bool:
    return bool(np.ptp(means) <= 1e-12 * max(1.0, float(np.abs(means).max())))


def constant_interval(
    value: float, num_prompts: int, bounds: tuple[float, float], confidence: float
) -> Interval:
    """Compute limits for the mean of a bounded quantity with the same value at each of the n prompts seen.

        low = c - u (c - min),   high = c + u (max - c),   u = 1 - (alpha / 2)^(1/n)

    u is the exact (Clopper-Pearson 1934) upper limit on the share of prompts that differ when none of n did;
    these could be as far away as the bounds. A bootstrap interval would have width 0.
    """
    share = -np.expm1(np.log((1 - confidence) / 2) / num_prompts)
    low, high = value - share * (value - bounds[0]), value + share * (bounds[1] - value)
    return Interval(float(value), float(low), float(high), num_prompts, "constant")


def rate_interval(scores: NDArray[np.float64], codes: NDArray[np.intp], confidence: float = 0.95) -> Interval:
    """Compute the Wilson interval for the mean over prompts of scores in [0, 1], without nan rows.

        centre = (p + z^2 / 2m) / (1 + z^2 / m),   half = z sqrt(p (1-p) / m + z^2 / 4m^2) / (1 + z^2 / m)

    One score of 0 or 1 per prompt: m = the number of prompts n, z normal ("wilson"). Shared scores or several
    rows per prompt: the effective sample size m = p (1-p) / (s^2 / n) with s^2 the variance of the prompts'
    means, and z from Student's t with n - 1 degrees ("wilson_effective"). If all prompts have one value, other than
    all 0 or all 1: see `constant_interval`. `scores`, `codes` (n,); at least one score must not be nan.
    Sources: Wilson 1927; Kish 1965 for m; Korn and Graubard 1998 for m in a score interval.
    """
    decided = ~np.isnan(scores)
    means = prompt_means(scores, codes)
    rate, num_prompts = float(means.mean()), len(means)
    single = num_prompts == decided.sum()
    if single and np.isin(scores[decided], (0.0, 1.0)).all():
        low, high = proportion_confint(rate * num_prompts, num_prompts, 1 - confidence, method="wilson")
        return Interval(rate, min(rate, float(low)), max(rate, float(high)), num_prompts, "wilson")
    if _is_constant(means):
        return constant_interval(rate, num_prompts, (0.0, 1.0), confidence)
    size = rate * (1 - rate) / (means.var(ddof=1) / num_prompts)
    alpha = 2 * stats.norm.sf(stats.t.isf((1 - confidence) / 2, num_prompts - 1))
    low, high = proportion_confint(rate * size, size, alpha, method="wilson")
    return Interval(rate, float(low), float(high), num_prompts, "wilson_effective")


def mean_interval(
    values: ArrayLike,
    prompt_ids: ArrayLike | None = None,
    confidence: float = 0.95,
    bounds: tuple[float, float] | None = None,
    num_resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """Compute the BCa bootstrap interval, over prompts, for the mean of reward, KL, length or any other quantity.

    Deterministic in its arguments. If all prompts give one value, BCa does not exist: with `bounds` see
    `constant_interval`; else the limits are that value ("constant"; right for the KL of a policy to itself).

    Args:
        values: The quantity (n,), without nan.
        prompt_ids: Prompt (n,) of each row; None when each row is its own prompt.
        confidence: Confidence level of the limits.
        bounds: Limits of the scale, if it has them.
        num_resamples: Number of resamples of the prompts.
        seed: Seed of the resamples.

    Raises ValueError on no rows, nan, values beyond bounds, or one prompt without bounds.
    Source: Efron 1987 (bias-corrected and accelerated), scipy.stats.bootstrap.
    """
    confidence = checked_confidence(confidence)
    array = without_nan(values, "values")
    if bounds is not None and (array.min() < bounds[0] or array.max() > bounds[1]):
        raise ValueError(f"values run from {array.min():g} to {array.max():g}, beyond the bounds {bounds}")
    means = prompt_means(array, prompt_codes(prompt_ids, len(array)))
    mean, num_prompts = float(means.mean()), len(means)
    if _is_constant(means):
        if bounds is not None:
            return constant_interval(mean, num_prompts, bounds, confidence)
        if num_prompts == 1:
            raise ValueError("one prompt gives a mean but no interval; measure at least two prompts")
        return Interval(mean, mean, mean, num_prompts, "constant")
    limits = stats.bootstrap(
        (means,),
        np.mean,
        n_resamples=num_resamples,
        batch=max(1, BATCH_ELEMENTS // num_prompts),
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(limits.low), float(limits.high), num_prompts, "bca")
