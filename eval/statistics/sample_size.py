"""Sample sizes: prompts that a comparison needs, and the difference that a number of prompts can detect."""

from __future__ import annotations

import math

from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import samplesize_confint_proportion

from eval.statistics.intervals import checked_confidence


def prompts_for_half_width(half_width: float, rate: float = 0.5, confidence: float = 0.95) -> int:
    """Compute the number of prompts for a win-rate interval of rate +- half_width.

        n = z^2 rate (1 - rate) / half_width^2

    The default rate is the worst case. Ties and shared scores need fewer. Raises ValueError unless `rate` and
    `half_width` are between 0 and 1. Source: statsmodels.stats.proportion.samplesize_confint_proportion.
    """
    for name, value in (("half_width", half_width), ("rate", rate)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1 (0.03 for three points), got {value}")
    alpha = 1 - checked_confidence(confidence)
    return math.ceil(samplesize_confint_proportion(rate, half_width, alpha=alpha, method="normal"))


def prompts_for_difference(difference: float, sd: float, power: float = 0.8, confidence: float = 0.95) -> int:
    """Compute the number of prompts for a paired test to detect a true `difference` with probability `power`.

        solves  P(|T| > t_{1 - alpha/2, n-1}) = power,   T noncentral t with shift sqrt(n) difference / sd

    `sd` is the standard deviation over prompts of the paired difference in score, from a pilot; for scores of
    0 and 1 it is sqrt(share of prompts where the systems differ - difference^2), at most 1. Raises ValueError
    on a difference that is 0 or beyond 1, sd <= 0, or a power that is not above 1 - confidence.
    Source: statsmodels.stats.power.TTestPower.
    """
    if not 0 < abs(difference) <= 1:
        raise ValueError(f"difference must be in (0, 1] (0.05 for five points), got {difference}")
    effect = abs(difference) / _checked_sd(sd)
    alpha = _checked_alpha(power, confidence)
    if TTestPower().power(effect, 2, alpha) >= power:
        return 2
    return math.ceil(float(TTestPower().solve_power(effect_size=effect, alpha=alpha, power=power)))


def detectable_difference(num_prompts: int, sd: float, power: float = 0.8, confidence: float = 0.95) -> float:
    """Compute the smallest true difference that a paired test on `num_prompts` detects with probability `power`.

    The inverse of `prompts_for_difference`; smaller differences are not resolvable at this n. Raises ValueError on
    fewer than two prompts, and as `prompts_for_difference`.
    """
    if num_prompts < 2:
        raise ValueError(f"num_prompts must be at least 2, got {num_prompts}")
    sd = _checked_sd(sd)
    alpha = _checked_alpha(power, confidence)
    return sd * float(TTestPower().solve_power(nobs=num_prompts, alpha=alpha, power=power))


def _checked_sd(sd: float) -> float:
    if not sd > 0:
        raise ValueError(f"sd must be > 0, the standard deviation of the paired difference, got {sd}")
    return sd


def _checked_alpha(power: float, confidence: float) -> float:
    alpha = 1 - checked_confidence(confidence)
    if not alpha < power < 1:
        raise ValueError(f"power must be between 1 - confidence = {alpha:g} and 1, got {power}")
    return alpha
