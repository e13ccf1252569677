"""Length bias of a reward model: how its margins follow the difference in length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.api import OLS, add_constant

from eval.statistics.intervals import prompt_codes, same_rows, without_nan
from eval.statistics.pair_accuracy import PairAccuracy, accuracy_by, pair_accuracy

SHORTER, LONGER, EQUAL = "chosen shorter", "chosen longer", "equal length"


@dataclass(frozen=True)
class Slope:
    """Score per token, with limits; nan where they are not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LengthBias:
    """Length bias over n pairs; correlations and slope are None where all lengths (or margins) differ equally.

    `correlation` is that of margin and length difference over both orders of each pair; part of it is that people
    prefer longer (or shorter) responses. `partial_correlation` and `slope` hold fixed which response is preferred, and
    `given_gap` the gap of the data's scores too (None without these). `length_judge` prefers the longer response.
    """

    n: int
    mean_difference: float
    correlation: float | None
    partial_correlation: float | None
    given_gap: float | None
    slope: Slope | None
    length_judge: PairAccuracy
    by_length: dict[str, PairAccuracy]


def length_bias(
    margins: ArrayLike,
    length_differences: ArrayLike,
    gaps: ArrayLike | None = None,
    prompt_ids: ArrayLike | None = None,
    confidence: float = 0.95,
) -> LengthBias:
    """Measure how margins (n,) follow the differences in length (n,), both chosen minus rejected.

        correlation = sum m d / sqrt(sum m^2 sum d^2)
        partial_correlation = corr(m - mean m, d - mean d),    m = a + slope d + error

    Over both orders of each pair, the label is s = +1 or -1 and the rows are (s m, s d): the least-squares residuals
    given s are s (m - mean m) and s (d - mean d), so the plain correlation and slope in one order are the partial ones
    given the label. The slope's interval is cluster-robust over prompts, with Student's t.

    Args:
        margins: score differences (n,).
        length_differences: differences in tokens (n,).
        gaps: differences (n,) of the data's own scores; None without them.
        prompt_ids: prompt (n,) of each pair; None when each has its own.
        confidence: level of the intervals.

    Raises ValueError on no pairs, nan or unequal lengths. Source: Singhal et al. 2023 (length in reward models).
    """
    margins, lengths = without_nan(margins, "margins"), without_nan(length_differences, "length_differences")
    same_rows({"margins": len(margins), "length_differences": len(lengths)})
    codes = prompt_codes(prompt_ids, len(margins))
    names = np.select([lengths < 0, lengths > 0], [SHORTER, LONGER], EQUAL)
    by_length = accuracy_by(margins, names.tolist(), codes, confidence)
    given_gap = None
    if gaps is not None:
        given_gap = partial_correlation(margins, lengths, without_nan(gaps, "gaps"))
    size = float(np.sqrt((margins**2).sum() * (lengths**2).sum()))
    return LengthBias(
        n=len(margins),
        mean_difference=float(lengths.mean()),
        correlation=float((margins * lengths).sum()) / size if size else None,
        partial_correlation=partial_correlation(margins, lengths),
        given_gap=given_gap,
        slope=slope(margins, lengths, codes, confidence),
        length_judge=pair_accuracy(lengths, codes, confidence),
        by_length={name: by_length[name] for name in (SHORTER, LONGER, EQUAL) if name in by_length},
    )


def partial_correlation(x: ArrayLike, y: ArrayLike, *controls: ArrayLike) -> float | None:
    """Compute the correlation of the residuals of x and y (n,) after least squares on 1 and the controls (n,) each.

    None where a residual is constant. Raises ValueError on unequal lengths.
    """
    columns = [np.asarray(column, dtype=np.float64) for column in (x, y, *controls)]
    same_rows({f"column {index}": len(column) for index, column in enumerate(columns)})
    design = np.stack([np.ones(len(columns[0])), *columns[2:]], axis=1)
    residuals = [_residual(design, column) for column in columns[:2]]
    norms = [float(np.linalg.norm(residual)) for residual in residuals]
    scales = [float(np.linalg.norm(column)) for column in columns[:2]]
    if any(norm <= 1e-9 * scale for norm, scale in zip(norms, scales, strict=True)):
        return None
    return float(residuals[0] @ residuals[1] / (norms[0] * norms[1]))


def _residual(design: NDArray[np.float64], column: NDArray[np.float64]) -> NDArray[np.float64]:
    return column - design @ np.linalg.lstsq(design, column, rcond=None)[0]


def slope(
    margins: NDArray[np.float64],
    lengths: NDArray[np.float64],
    codes: NDArray[np.intp],
    confidence: float = 0.95,
) -> Slope | None:
    """Fit margin = a + slope * length difference; None where all lengths differ equally.

    Limits are nan below three prompts. `codes` (n,) numbers the prompts. Source: Liang and Zeger 1986.
    """
    if np.ptp(lengths) == 0:
        return None
    num_prompts = len(np.unique(codes))
    fit = OLS(margins, add_constant(lengths))
    if num_prompts < 3:
        return Slope(float(fit.fit().params[1]), np.nan, np.nan)
    robust = fit.fit(cov_type="cluster", cov_kwds={"groups": codes})
    value, error = float(robust.params[1]), float(robust.bse[1])
    half = stats.t.isf((1 - confidence) / 2, num_prompts - 1) * error
    return Slope(value, value - half, value + half)
