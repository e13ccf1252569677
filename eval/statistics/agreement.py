"""Agreement of two judges, or of a judge with people, beyond chance and relative to human-human agreement.

A score becomes one of three verdicts: above 0.5 for the first response, below for the second, 0.5 a tie.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from eval.statistics.intervals import (
    Interval,
    checked_confidence,
    checked_scores,
    mean_interval,
    prompt_codes,
    prompt_means,
    rate_interval,
    same_rows,
)


@dataclass(frozen=True)
class Agreement:
    """Share of comparisons on which both give the same verdict, and Cohen's kappa, without `undecided` rows.

    `chance` is the expected agreement of two independent judges with the same frequencies of verdicts. Kappa is nan
    when it is 1, that is when both always give the same single verdict.
    """

    n: int
    num_prompts: int
    undecided: int
    agreement: float
    low: float
    high: float
    chance: float
    kappa: float
    kappa_low: float
    kappa_high: float


def agreement(
    scores_1: ArrayLike, scores_2: ArrayLike, prompt_ids: ArrayLike | None = None, confidence: float = 0.95
) -> Agreement:
    """Compute agreement and Cohen's kappa of two judges on the same comparisons, with intervals over prompts.

        kappa = (p_o - p_e) / (1 - p_e),    p_e = sum_k p_1k p_2k over the verdicts k

    `scores_1`, `scores_2` (n,) in [0, 1], nan = undecided; a row is the same comparison in both. The interval of kappa
    uses the delta method with prompts as units; with one row per prompt it equals that of
    statsmodels.stats.inter_rater.cohens_kappa. Under perfect agreement its width would be 0, so the limits are
    computed from those of the agreement at the same p_e.
    Raises ValueError on unequal lengths, scores outside [0, 1], or no row that both decided.
    Sources: Cohen 1960; Fleiss, Cohen and Everitt 1969.
    """
    confidence = checked_confidence(confidence)
    scores_1, scores_2 = checked_scores(scores_1, "scores_1"), checked_scores(scores_2, "scores_2")
    same_rows({"scores_1": len(scores_1), "scores_2": len(scores_2)})
    codes = prompt_codes(prompt_ids, len(scores_1))
    decided = ~(np.isnan(scores_1) | np.isnan(scores_2))
    if not decided.any():
        raise ValueError(
            f"none of {len(scores_1)} comparisons is decided by both; let both judge the same comparisons"
        )
    verdicts_1, verdicts_2, codes = _one_hot(scores_1[decided]), _one_hot(scores_2[decided]), codes[decided]
    agree = (verdicts_1 * verdicts_2).sum(axis=1)
    share, chance, kappa, limits = _kappa(agree, verdicts_1, verdicts_2, codes, confidence)
    return Agreement(
        n=int(decided.sum()),
        num_prompts=share.num_prompts,
        undecided=int((~decided).sum()),
        agreement=share.value,
        low=share.low,
        high=share.high,
        chance=chance,
        kappa=kappa,
        kappa_low=limits[0],
        kappa_high=limits[1],
    )


def _one_hot(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Encode verdicts as (..., 3): second, tie, first; nan stays nan."""
    hot = np.stack([scores < 0.5, scores == 0.5, scores > 0.5], axis=-1).astype(np.float64)
    return np.where(np.isnan(scores)[..., None], np.nan, hot)


def _kappa(
    agree: NDArray[np.float64],
    shares_1: NDArray[np.float64],
    shares_2: NDArray[np.float64],
    codes: NDArray[np.intp],
    confidence: float,
) -> tuple[Interval, float, float, tuple[float, float]]:
    """Compute p_o, p_e, kappa and its limits, from each row's agreement (n,) and shares of the verdicts (n, 3).

    d kappa = (d p_o - (1 - kappa) d p_e) / (1 - p_e),    d p_e = sum_k (p_2k d p_1k + p_1k d p_2k)
    """
    share = rate_interval(agree, codes, confidence)
    agree, shares_1, shares_2 = (prompt_means(x, codes) for x in (agree, shares_1, shares_2))
    mean_1, mean_2 = shares_1.mean(axis=0), shares_2.mean(axis=0)
    chance = float(mean_1 @ mean_2)
    if 1 - chance < 1e-12:
        return share, chance, np.nan, (np.nan, np.nan)
    kappa = (share.value - chance) / (1 - chance)
    slopes = (agree - (1 - kappa) * (shares_1 @ mean_2 + shares_2 @ mean_1)) / (1 - chance)
    num_prompts = len(agree)
    error = slopes.std(ddof=1) / np.sqrt(num_prompts) if num_prompts > 1 else 0.0
    if error < 1e-12:
        low, high = ((limit - chance) / (1 - chance) for limit in (share.low, share.high))
        return share, chance, kappa, (min(kappa, low), max(kappa, high))
    half = stats.t.isf((1 - confidence) / 2, num_prompts - 1) * error
    return share, chance, kappa, (float(kappa - half), float(min(1.0, kappa + half)))


@dataclass(frozen=True)
class HumanCeiling:
    """A judge compared with people, on the `num_pairs` pairs with at least two human labels and a judge's verdict.

    `judge` is the probability that the judge agrees with an annotator of the pair, `humans` that two of its annotators
    agree: the ceiling. `difference` is judge - humans on the same pairs. Limits of the kappas are (low, high).
    """

    num_pairs: int
    left_out: int
    judge: Interval
    humans: Interval
    difference: Interval
    judge_kappa: float
    judge_kappa_limits: tuple[float, float]
    human_kappa: float
    human_kappa_limits: tuple[float, float]


def human_ceiling(
    judge_scores: ArrayLike,
    human_scores: ArrayLike,
    prompt_ids: ArrayLike | None = None,
    confidence: float = 0.95,
    num_resamples: int = 9999,
    seed: int = 0,
) -> HumanCeiling:
    """Compare judge-human agreement with human-human agreement on the same pairs.

        pair i with m_i labels, m_ik of them verdict k, judge's verdict j:
        judge_i = m_ij / m_i,    humans_i = sum_k m_ik (m_ik - 1) / (m_i (m_i - 1))

    Each prompt counts once. The p_e of human kappa comes from the pooled labels; with equally many labels per pair it
    is Fleiss' kappa. The difference has a BCa interval.

    Args:
        judge_scores: Scores (n,) of the judge in [0, 1]; nan = no verdict.
        human_scores: Scores (n, annotators) of the people in [0, 1]; nan = no label.
        prompt_ids: Prompt (n,) of each row; None when each row is its own prompt.
        confidence: Confidence level of all limits.
        num_resamples: Number of resamples for the difference.
        seed: Seed of the resamples.

    Raises ValueError on unequal lengths, or when no pair has two labels and a verdict.
    Sources: Cohen 1960; Fleiss 1971.
    """
    confidence = checked_confidence(confidence)
    judge_scores = checked_scores(judge_scores, "judge_scores")
    labels = np.asarray(human_scores, dtype=np.float64)
    if labels.ndim != 2 or labels.shape[1] < 2:
        raise ValueError(f"human_scores must be (pairs, at least 2 annotators), got shape {labels.shape}")
    same_rows({"judge_scores": len(judge_scores), "human_scores": len(labels)})
    checked_scores(labels.ravel(), "human_scores")
    codes = prompt_codes(prompt_ids, len(labels))
    usable = ((~np.isnan(labels)).sum(axis=1) >= 2) & ~np.isnan(judge_scores)
    if not usable.any():
        raise ValueError(
            f"none of {len(labels)} pairs has two human labels and a verdict of the judge; "
            "a ceiling needs pairs that several people labelled"
        )
    codes, verdicts = codes[usable], _one_hot(judge_scores[usable])
    counts = np.nansum(_one_hot(labels[usable]), axis=1)
    num_labels = counts.sum(axis=1)
    shares = counts / num_labels[:, None]
    with_judge = (verdicts * shares).sum(axis=1)
    with_human = (counts * (counts - 1)).sum(axis=1) / (num_labels * (num_labels - 1))
    judge, _, judge_kappa, judge_limits = _kappa(with_judge, verdicts, shares, codes, confidence)
    humans, _, human_kappa, human_limits = _kappa(with_human, shares, shares, codes, confidence)
    return HumanCeiling(
        num_pairs=int(usable.sum()),
        left_out=int((~usable).sum()),
        judge=judge,
        humans=humans,
        difference=mean_interval(
            with_judge - with_human, codes, confidence, (-1.0, 1.0), num_resamples=num_resamples, seed=seed
        ),
        judge_kappa=judge_kappa,
        judge_kappa_limits=judge_limits,
        human_kappa=human_kappa,
        human_kappa_limits=human_limits,
    )
