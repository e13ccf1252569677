"""The win rate that a system would have if its responses were as long as the other's."""

from __future__ import annotations

import warnings as python_warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from statsmodels.genmod.families import Binomial
from statsmodels.genmod.generalized_linear_model import GLM
from statsmodels.tools.sm_exceptions import DomainWarning, PerfectSeparationWarning

from eval.statistics.intervals import checked_confidence, checked_scores, prompt_codes, same_rows, without_nan

MIN_DECIDED = 10
NEAR = 0.25  # |tanh(d / sd)| up to this is about equal length
FAR = 2.0  # standard deviations beyond which tanh(d / sd) is about 1 and constant
MIN_REACH = 0.05
MIN_NEAR_SHARE = 0.10
MIN_SIDE_SHARE = 0.05


@dataclass(frozen=True)
class LengthControlled:
    """A length-controlled win rate; `raw_rate` is the mean score of the same rows.

    `slope` is the change in log-odds per standard deviation of extra length at equal length (above 0: the judge
    prefers longer responses; nan when lengths never differ). `near_share` is the share of comparisons of about equal
    length, `longer_share` the share where system a's response is longer (equal ones count half).
    """

    n: int
    undecided: int
    rate: float
    low: float
    high: float
    raw_rate: float
    slope: float
    slope_low: float
    slope_high: float
    near_share: float
    longer_share: float
    method: str
    warnings: tuple[str, ...]


def length_controlled_win_rate(
    scores: ArrayLike,
    length_a: ArrayLike,
    length_b: ArrayLike,
    prompt_ids: ArrayLike | None = None,
    confidence: float = 0.95,
) -> LengthControlled:
    """Estimate the win rate at equal length by a logistic regression of the score on the length difference.

        logit P(a beats b) = theta + phi tanh(d / sd(d)),   d = length_a - length_b,    rate = sigmoid(theta)

    The interval is that of the fitted model at d = 0 with the HC1 covariance of (theta, phi), clustered by prompt when
    prompts repeat: it includes the error of the estimates, which the standard error of the mean of fitted
    probabilities omits.
    Warns of extrapolation when few comparisons are of about equal length or nearly all differ to one side. Warns
    when length separates wins from losses (or there are only wins, or only losses): then no maximum-likelihood
    estimate exists, and half a tie at each end of the length scale is added ("glm_ridge"), with the model's own
    covariance; likewise when all scores are the same share, as from a judge that always picks one slot, where a robust
    covariance would be zero.

    Args:
        scores: Scores (n,) of system a in [0, 1]; nan = undecided.
        length_a: Length (n,) >= 0 of each response of system a.
        length_b: The same of system b, in the same unit.
        prompt_ids: Prompt (n,) of each row; None when each row is its own prompt.
        confidence: Confidence level of the limits.

    Raises ValueError when 95% of the d are farther than 2 sd(d) from 0; on unequal rows, bad lengths,
    fewer than 10 decided prompts, or lengths that differ by the same amount everywhere.
    Sources: Dubois et al. 2024 (AlpacaEval 2), section 3, without the terms of its own prompts; MacKinnon and
    White 1985 (HC1).
    """
    confidence = checked_confidence(confidence)
    scores = checked_scores(scores)
    longer = _length_difference(length_a, length_b, len(scores))
    codes = prompt_codes(prompt_ids, len(scores))
    decided = ~np.isnan(scores)
    wins, longer, codes = scores[decided], longer[decided], np.unique(codes[decided], return_inverse=True)[1]
    _require_overlap(longer, len(np.unique(codes)), len(scores))
    differ = np.ptp(longer) > 0
    x = np.tanh(longer / longer.std()) if differ else np.zeros(len(longer))
    near_share = float((np.abs(x) <= NEAR).mean())
    longer_share = float(((x > 0) + 0.5 * (x == 0)).mean())
    notes = []
    if near_share < MIN_NEAR_SHARE or min(longer_share, 1 - longer_share) < MIN_SIDE_SHARE:
        notes.append(
            f"little overlap in length: {near_share:.0%} of comparisons are of about equal length and system a "
            f"is the longer one in {longer_share:.0%}; the rate at equal length is extrapolated"
        )
    fit, method, note = _regression(wins, x, codes, differ)
    notes += [note] if note else []
    equal_length = fit.get_prediction(np.eye(1, 1 + differ))
    low, high = equal_length.conf_int(alpha=1 - confidence)[0]
    if not np.isfinite([low, high]).all():
        raise ValueError("the regression on length has no finite solution here; report the plain win rate")
    slope = fit.params[1] if differ else np.nan
    slope_low, slope_high = fit.conf_int(alpha=1 - confidence)[1] if differ else (np.nan, np.nan)
    return LengthControlled(
        n=len(scores),
        undecided=int((~decided).sum()),
        rate=float(equal_length.predicted_mean[0]),
        low=float(low),
        high=float(high),
        raw_rate=float(wins.mean()),
        slope=float(slope),
        slope_low=float(slope_low),
        slope_high=float(slope_high),
        near_share=near_share,
        longer_share=longer_share,
        method=method,
        warnings=tuple(notes),
    )


def _length_difference(length_a: ArrayLike, length_b: ArrayLike, num_scores: int) -> NDArray[np.float64]:
    """Return length_a - length_b (n,). Raises ValueError for negative or missing lengths and unequal rows."""
    length_a, length_b = without_nan(length_a, "length_a"), without_nan(length_b, "length_b")
    same_rows({"scores": num_scores, "length_a": len(length_a), "length_b": len(length_b)})
    if min(length_a.min(), length_b.min()) < 0:
        raise ValueError("length_a and length_b must be >= 0; give characters or tokens of each response")
    return length_a - length_b


def _require_overlap(longer: NDArray[np.float64], num_prompts: int, num_scores: int) -> None:
    """Raise ValueError where the decided comparisons cannot identify the rate at equal length."""
    if num_prompts < MIN_DECIDED:
        raise ValueError(
            f"{len(longer)} of {num_scores} comparisons are decided, on {num_prompts} prompts; length control needs at "
            f"least {MIN_DECIDED} prompts"
        )
    if np.ptp(longer) == 0 and longer[0] != 0:
        raise ValueError(
            f"length_a - length_b is {longer[0]:g} in every comparison, so the effect of length cannot be told "
            "from that of the system; report the plain win rate"
        )
    reach = (np.abs(longer) <= FAR * longer.std()).mean()
    if np.ptp(longer) > 0 and reach < MIN_REACH:
        raise ValueError(
            f"responses differ in length by {longer.mean():.3g} on average (sd {longer.std():.3g}): equal length is "
            f"{FAR:g} deviations or more away from {1 - reach:.0%} of them, so nothing tells the rate there"
        )


def _regression(wins: NDArray[np.float64], x: NDArray[np.float64], codes: NDArray, differ: bool):
    """Fit the scores (n,) on 1 and, if lengths `differ`, on x. Returns fit, method and a warning or ""."""
    design = np.stack([np.ones_like(x), x], axis=1) if differ else np.ones((len(x), 1))
    if note := _obstacle(wins, x):
        ends = np.array([[1.0, 1.0], [1.0, -1.0]])[:, : design.shape[1]]
        fit = _fit(
            np.append(wins, [0.5, 0.5]),
            np.concatenate([design, ends]),
            freq_weights=np.append(1 / np.bincount(codes)[codes], [0.5, 0.5]),  # each prompt counts once
        )
        return fit, "glm_ridge", note
    if len(np.unique(codes)) == len(codes):
        # statsmodels treats "HC1" as HC0 for a GLM; the factor n / (n - k) corrects that.
        scaling = {"scaling_factor": len(wins) / (len(wins) - design.shape[1])}
        return _fit(wins, design, cov_type="HC0", cov_kwds=scaling), "glm_hc1", ""
    return _fit(wins, design, cov_type="cluster", cov_kwds={"groups": codes}), "glm_clustered", ""


def _obstacle(wins: NDArray[np.float64], x: NDArray[np.float64]) -> str:
    """Return the reason why the estimate or its robust covariance does not exist; empty where both do.

    The estimate does not exist where a threshold on x separates all wins from all losses; a shared score is both.
    """
    if np.ptp(wins) == 0 and 0 < wins[0] < 1:
        return (
            f"every decided comparison has the score {wins[0]:g}, so nothing shows how much scores vary; the interval "
            "is that of as many wins and losses"
        )
    won, lost = x[wins > 0], x[wins < 1]
    if len(won) and len(lost) and (np.ptp(x) == 0 or (won.max() > lost.min() and lost.max() > won.min())):
        return ""
    return (
        "length or the system alone tells every win from every loss, so the likelihood has no maximum; the rate is "
        "held finite by one added tie, and its interval rests on that"
    )


def _fit(wins: NDArray[np.float64], design: NDArray[np.float64], freq_weights=None, **covariance):
    with python_warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        python_warnings.simplefilter("ignore", DomainWarning)
        python_warnings.simplefilter("ignore", PerfectSeparationWarning)  # `_obstacle` reports it
        return GLM(wins, design, family=Binomial(), freq_weights=freq_weights).fit(**covariance)
