"""Intervals for a training method when both training seeds and prompts are random draws.

The score of one run on one prompt is y_sp = mean + a_s + b_p + e_sp: effects of the seed and of the prompt, and the
residual. Prompts are shared by all seeds. Seeds are few, so the limits use, for each source of variation, Student's t
with its own degrees of freedom: with two seeds 12.7 times their spread. Resampling seeds and prompts (the hierarchical
bootstrap) has no such correction: it shrinks the spread of S seeds by (S - 1) / S and uses normal quantiles.
Satterthwaite's single t for the sum of the sources covers 87-92% at two and three seeds that differ: where two seeds
happen to agree, it treats the seed effect as known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import stdtrit

from eval.statistics.intervals import Interval, checked_confidence, checked_values, constant_interval


@dataclass(frozen=True)
class Difference:
    """System 1 minus system 2, and the two-sided p-value of zero difference."""

    difference: float
    low: float
    high: float
    p_value: float
    num_prompts: int
    over: str
    "What the interval is over: `prompts`, or `seeds and prompts`."
    detectable: float | None = None
    "Smallest true difference that this many prompts detect with power 0.8; None where seeds count, too."


def seed_interval(
    scores: ArrayLike, bounds: tuple[float, float] | None = (0.0, 1.0), confidence: float = 0.95
) -> Interval:
    """Compute the mean over seeds with an interval ("seeds") for new seeds and new prompts.

        mean = mean_s mean_p y_sp,    limits = mean +- sqrt(t_{S-1}^2 V_seed + t_{P-1}^2 max(V_prompt - V_cell, 0))
        V_seed = sum_s (y_s - mean)^2 / (S (S-1)),    V_prompt = sum_p (y_p - mean)^2 / (P (P-1))
        V_cell = sum_sp (y_sp - y_s - y_p + mean)^2 / ((S-1) (P-1) S P)

    y_s, y_p are the means of a row and of a column (y_p after removing the seeds' levels when cells are missing); t
    is Student's quantile. V_cell is part of both V_seed and V_prompt, so it is subtracted once; the limits are never
    narrower than those of V_cell alone. `scores` is (S, P), any score or metric; nan = undecided. `bounds` are the
    limits of the scale, None if it has none; the interval is clipped to them. Coverage of 95% limits, by simulation
    over spreads of seeds, prompts and cells: 95-99% at 2 seeds and at 3, 95-98% at 5, 95-97% at 10. Raises ValueError
    on one seed (see `eval.statistics.win_rate` for one run), one prompt, a seed without a score, values outside the
    bounds, or seeds that share no prompts.
    Sources: Banerjee 1960 (a t for each source: coverage at least nominal); Brennan 2001 (two-way random effects).
    """
    confidence = checked_confidence(confidence)
    parts = _Parts(_checked_matrix(scores, "scores", bounds), "scores")
    value = float(parts.seed_means.mean())
    sources = _Sources([parts], parts.prompt_parts)
    num_prompts = len(parts.prompt_parts)
    low = high = value
    if sources.vary:
        half = sources.half_width(1 - confidence)
        low, high = np.clip([value - half, value + half], *(bounds or (-np.inf, np.inf))).tolist()
    elif bounds is not None:
        interval = constant_interval(value, num_prompts, bounds, confidence)
        low, high = interval.low, interval.high
    return Interval(value, low, high, num_prompts, "seeds")


def seed_difference(scores_1: ArrayLike, scores_2: ArrayLike, confidence: float = 0.95) -> Difference:
    """Compute the difference of two methods judged on the same prompts, each with its own seeds.

        half-width^2 = max(t_welch^2 (V_1 + V_2), t_{S1-1}^2 V_1, t_{S2-1}^2 V_2) + t_{P-1}^2 max(V_prompt - V_cell, 0)

    V_1, V_2 are V_seed of the methods, V_prompt is that of the prompts' differences, V_cell the sum of both: the
    prompts are paired, the seeds are not. Welch's t is for the difference of the seeds' means; it covers 89% where
    the method that varies more has two seeds, so each method's own t is a lower bound. The p-value is the level at
    which the interval reaches zero. `scores_1` (S1, P), `scores_2` (S2, P), columns in one order, nan = undecided.
    Prompts without any score of one method are dropped. Coverage of 95% limits, by simulation: 95-99.8% where a
    method has 2 seeds, 95-99% at 3, 94.5-98% from 5. Raises ValueError on unequal numbers of prompts, as
    `seed_interval` does, and when nothing varies, since then no interval exists.
    Sources: Welch 1947; Banerjee 1960.
    """
    confidence = checked_confidence(confidence)
    scores_1, scores_2 = _checked_matrix(scores_1, "scores_1"), _checked_matrix(scores_2, "scores_2")
    if scores_1.shape[1] != scores_2.shape[1]:
        raise ValueError(
            f"scores_1 has {scores_1.shape[1]} prompts but scores_2 has {scores_2.shape[1]}; "
            "judge both methods on the same prompts, columns in one order"
        )
    shared = ~(np.isnan(scores_1).all(axis=0) | np.isnan(scores_2).all(axis=0))
    parts_1, parts_2 = _Parts(scores_1[:, shared], "scores_1"), _Parts(scores_2[:, shared], "scores_2")
    difference = float(parts_1.seed_means.mean() - parts_2.seed_means.mean())
    sources = _Sources([parts_1, parts_2], parts_1.prompt_parts - parts_2.prompt_parts)
    if not sources.vary:
        raise ValueError("no score varies over seeds or prompts, so the difference has no interval")
    half = sources.half_width(1 - confidence)
    p_value, num_prompts = sources.level_at(abs(difference)), int(shared.sum())
    limits = difference - half, difference + half
    return Difference(difference, *limits, p_value, num_prompts, "seeds and prompts")


def _checked_matrix(
    scores: ArrayLike, name: str, bounds: tuple[float, float] | None = None
) -> NDArray[np.float64]:
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name} must be (seeds, prompts) with at least one score, got shape {array.shape}")
    checked_values(array.ravel(), name)
    if len(array) == 1:
        raise ValueError(
            f"{name} has one seed, which says nothing of other runs; train more seeds, or give the interval "
            "over prompts of this one run (eval.statistics.win_rate, eval.statistics.intervals)"
        )
    if bounds is not None and ((array < bounds[0]) | (array > bounds[1])).any():
        raise ValueError(
            f"{name} must be in {list(bounds)} (nan undecided); set bounds to the limits of the scale"
        )
    return array


class _Parts:
    """A method's run means (S,), each prompt's part of its mean (P,), and the error variance of the cells.

    Raises ValueError, naming the scores, where these are not defined.
    """

    def __init__(self, scores: NDArray[np.float64], name: str) -> None:
        decided = ~np.isnan(scores)
        per_seed = decided.sum(axis=1)
        if (per_seed == 0).any():
            seeds = np.flatnonzero(per_seed == 0).tolist()
            raise ValueError(
                f"seeds {seeds} of {name} have no decided score; judge them, or leave them out and report it"
            )
        scores, decided = scores[:, decided.any(axis=0)], decided[:, decided.any(axis=0)]
        num_seeds, num_prompts = scores.shape
        if num_prompts == 1:
            raise ValueError(f"{name} has one prompt, which says nothing of others; judge more prompts")
        self.cell_df = int(decided.sum()) - num_seeds - num_prompts + 1
        if self.cell_df < 1:
            raise ValueError(f"the seeds of {name} share no prompts; judge every seed on the same prompts")
        self.seed_means = np.nanmean(scores, axis=1)
        centred = np.where(decided, scores - self.seed_means[:, None], 0.0)
        rest = np.where(decided, centred - centred.sum(axis=0) / decided.sum(axis=0), 0.0)
        self.prompt_parts = (centred / per_seed[:, None]).sum(axis=0) / num_seeds
        self.cell_variance = float((rest**2).sum() / self.cell_df * (1 / per_seed).sum() / num_seeds**2)


class _Sources:
    """Variances of each method's seeds and of the prompts, with degrees of freedom; both include the cells' error."""

    def __init__(self, methods: list[_Parts], prompt_parts: NDArray[np.float64]) -> None:
        num_prompts = len(prompt_parts)
        self.seed_variances = np.array([m.seed_means.var(ddof=1) / len(m.seed_means) for m in methods])
        self.seed_dfs = np.array([len(m.seed_means) - 1 for m in methods])
        self.cell_variance = sum(m.cell_variance for m in methods)
        self.cell_df = sum(m.cell_df for m in methods)
        prompt_variance = float((prompt_parts**2).sum()) * num_prompts / (num_prompts - 1)
        self.prompt_variance = max(prompt_variance - self.cell_variance, 0.0)
        self.prompt_df = num_prompts - 1

    @property
    def vary(self) -> bool:
        return float(self.seed_variances.sum()) + self.prompt_variance + self.cell_variance >= 1e-24

    def half_width(self, alpha: float) -> float:
        """Compute half of the interval's width at level 1 - alpha."""

        def square(df, variance):
            return stdtrit(df, alpha / 2) ** 2 * variance

        total = self.seed_variances.sum()
        seeds = 0.0
        if total > 0:
            welch_df = total**2 / (self.seed_variances**2 / self.seed_dfs).sum()
            seeds = max(square(welch_df, total), *square(self.seed_dfs, self.seed_variances))
        both = seeds + square(self.prompt_df, self.prompt_variance)
        return float(np.sqrt(max(both, square(self.cell_df, self.cell_variance))))

    def level_at(self, distance: float) -> float:
        """Find the alpha at which the half-width equals `distance`: 1 for no distance, at least exp(-100)."""

        def excess(log_alpha: float) -> float:
            return self.half_width(np.exp(log_alpha)) - distance

        if excess(0.0) >= 0:
            return 1.0
        return float(np.exp(brentq(excess, -100.0, 0.0))) if excess(-100.0) > 0 else float(np.exp(-100.0))
