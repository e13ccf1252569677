"""The win rate of one system against another, and a paired test of two systems on their shared prompts.

A score is a system's result in one comparison: 1 won, 0 lost, 0.5 tied, values between them when two orders
were averaged, nan without a verdict. A missing verdict is never imputed: it is counted, and the win rate is
bounded by its values if all missing ones were lost or won.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

from eval.statistics.intervals import (
    BATCH_ELEMENTS,
    checked_confidence,
    checked_scores,
    mean_interval,
    prompt_codes,
    prompt_means,
    rate_interval,
    same_rows,
)


@dataclass(frozen=True)
class WinRate:
    """A win rate with its limits; counts are of comparisons, `n` in all, including undecided ones.

    `rate` is the mean over the `num_prompts` prompts with a verdict; `worst_case` and `best_case` are the
    same over all prompts with every undecided comparison lost, or won.
    """

    n: int
    num_prompts: int
    wins: int
    ties: int
    losses: int
    undecided: int
    rate: float
    low: float
    high: float
    method: str
    worst_case: float
    best_case: float


def win_rate(scores: ArrayLike, prompt_ids: ArrayLike | None = None, confidence: float = 0.95) -> WinRate:
    """Compute the win rate with a Wilson interval that counts each prompt once.

        rate = mean over prompts of the mean score of the prompt,    a tie is half a win

    `scores` (n,) in [0, 1], nan = undecided; `prompt_ids` (n,), None when each row is its own prompt.
    For the interval see `eval.statistics.intervals.rate_interval`. Above 0.5 counts as a win, below as a loss.
    Raises ValueError on no rows, scores outside [0, 1], unequal lengths, or when nothing is decided.
    """
    confidence = checked_confidence(confidence)
    scores = checked_scores(scores)
    codes = prompt_codes(prompt_ids, len(scores))
    undecided = np.isnan(scores)
    if undecided.all():
        raise ValueError(
            f"all {len(scores)} comparisons are undecided, so there is no win rate; "
            "see the statuses of the verdicts (refused, malformed, truncated, failed) and judge them again"
        )
    interval = rate_interval(scores, codes, confidence)
    return WinRate(
        n=len(scores),
        num_prompts=interval.num_prompts,
        wins=int((scores > 0.5).sum()),
        ties=int((scores == 0.5).sum()),
        losses=int((scores < 0.5).sum()),
        undecided=int(undecided.sum()),
        rate=interval.value,
        low=interval.low,
        high=interval.high,
        method=interval.method,
        worst_case=float(prompt_means(np.where(undecided, 0.0, scores), codes).mean()),
        best_case=float(prompt_means(np.where(undecided, 1.0, scores), codes).mean()),
    )


@dataclass(frozen=True)
class PairedTest:
    """Score of system 1 minus that of system 2, over the `num_prompts` prompts where both have one.

    `better`, `equal` and `worse` count these prompts by sign; `undecided` counts the rows left out.
    """

    num_prompts: int
    undecided: int
    better: int
    equal: int
    worse: int
    difference: float
    low: float
    high: float
    p_value: float


def paired_test(
    scores_1: ArrayLike,
    scores_2: ArrayLike,
    prompt_ids: ArrayLike | None = None,
    confidence: float = 0.95,
    num_resamples: int = 9999,
    seed: int = 0,
) -> PairedTest:
    """Test whether two systems score differently against one baseline on the same prompts.

        d_p = mean over the rows of prompt p of (scores_1 - scores_2),    difference = mean_p d_p

    The p-value (two-sided) is of the sign-flip test: if the systems are equally good, each d_p is as likely to
    be -d_p. It is exact while 2^(nonzero d) <= `num_resamples`, else sampled with `seed`; on scores of 0 and 1 it is
    the exact McNemar test. The interval is BCa over prompts.

    Args:
        scores_1: Scores (n,) of system 1 in [0, 1]; nan = undecided.
        scores_2: Those of system 2 in the same rows.
        prompt_ids: Prompt (n,) of each row; None when each row is its own prompt.
        confidence: Confidence level of the limits.
        num_resamples: Number of resamples of the interval, and the most flips of the test.
        seed: Seed of both.

    Raises ValueError on unequal lengths, or when no row has both scores.
    Source: Fisher 1935, section 21; scipy.stats.permutation_test.
    """
    confidence = checked_confidence(confidence)
    scores_1, scores_2 = checked_scores(scores_1, "scores_1"), checked_scores(scores_2, "scores_2")
    same_rows({"scores_1": len(scores_1), "scores_2": len(scores_2)})
    codes = prompt_codes(prompt_ids, len(scores_1))
    differences = scores_1 - scores_2
    decided = ~np.isnan(differences)
    if not decided.any():
        raise ValueError(
            f"none of {len(differences)} rows is decided for both systems; "
            "compare systems that were judged on the same prompts"
        )
    interval = mean_interval(
        differences[decided], codes[decided], confidence, (-1.0, 1.0), num_resamples=num_resamples, seed=seed
    )
    means = prompt_means(differences, codes)
    signs = np.where(np.isclose(means, 0, atol=1e-12), 0, np.sign(means))
    return PairedTest(
        num_prompts=len(means),
        undecided=int((~decided).sum()),
        better=int((signs > 0).sum()),
        equal=int((signs == 0).sum()),
        worse=int((signs < 0).sum()),
        difference=interval.value,
        low=interval.low,
        high=interval.high,
        p_value=_sign_flip_p_value(means[signs != 0], num_resamples, seed),
    )


def _sign_flip_p_value(differences: NDArray[np.float64], num_resamples: int, seed: int) -> float:
    """Compute the two-sided p-value; zeros do not change under a flip, so `differences` excludes them."""
    if len(differences) < 2:
        return 1.0  # with one difference, both flips are equally far from 0
    test = stats.permutation_test(
        (differences,),
        lambda x, axis: x.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=num_resamples,
        batch=max(1, BATCH_ELEMENTS // len(differences)),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Adjust p-values (m,) for m tests by Holm's method, in the given order, which bounds the familywise error.

        sorted p_(1) <= ... <= p_(m):    adjusted_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))

    Raises ValueError on no values, nan, or values outside [0, 1]. Source: Holm 1979; statsmodels multipletests.
    """
    array = np.asarray(p_values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"p_values must be (m,) with at least one value, got shape {array.shape}")
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"p_values must be in [0, 1], got {array.tolist()}; leave out what was not tested")
    return multipletests(array, method="holm")[1]
