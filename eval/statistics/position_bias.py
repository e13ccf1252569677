"""Position bias of a judge: its preference for the first slot, and its consistency when the two are swapped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from eval.statistics.agreement import Agreement, agreement
from eval.statistics.intervals import (
    checked_confidence,
    checked_scores,
    prompt_codes,
    prompt_means,
    rate_interval,
)


@dataclass(frozen=True)
class PositionBias:
    """Statistics of the first slot over `num_calls` verdicts.

    `first_twice` and `second_twice` count comparisons where the same slot won in both orders; `p_value` tests
    a first share of one half. `consistency` is the agreement of the two orders on the responses; None when each
    comparison was asked in one order only.
    """

    num_calls: int
    undecided: int
    first_share: float
    low: float
    high: float
    first_twice: int
    second_twice: int
    p_value: float
    consistency: Agreement | None


def position_bias(
    first_slot_wins: ArrayLike, prompt_ids: ArrayLike | None = None, confidence: float = 0.95
) -> PositionBias:
    """Compute the share of verdicts for the first slot with interval and sign test, and swap consistency.

        s_p = mean over the verdicts of prompt p of (first slot won - 1/2),    sign test: as many s_p > 0 as < 0?

    `first_slot_wins` is (n, 2), the orders ab and ba of n comparisons, or (n,) or (n, 1) when each was asked in
    one order drawn at random: 1 the first slot won, 0 the second, 0.5 a tie, nan or None no verdict. A judge whose
    verdict is the same after the swap has s_p = 0, so the test uses the other prompts; calls are not independent and
    are never tested as if they were. A comparison with one missing order is left out of the share.
    Raises ValueError on another shape or other values, or when nothing is decided.
    Source: exact binomial test, scipy.stats.binomtest.
    """
    confidence = checked_confidence(confidence)
    slots = np.asarray(first_slot_wins, dtype=np.float64)
    if slots.ndim == 1:
        slots = slots[:, None]
    if slots.ndim != 2 or slots.shape[1] not in (1, 2):
        raise ValueError(f"first_slot_wins must be (n,) or (n, 2), got shape {slots.shape}")
    checked_scores(slots.ravel(), "first_slot_wins")
    codes = prompt_codes(prompt_ids, len(slots))
    shares = slots.mean(axis=1)  # nan as soon as one order is missing
    decided = ~np.isnan(shares)
    if not decided.any():
        raise ValueError(
            f"none of {len(slots)} comparisons has all its verdicts, so nothing can be said of the slots; "
            "see the statuses of the verdicts"
        )
    interval = rate_interval(shares, codes, confidence)
    leaning = prompt_means(shares, codes) - 0.5
    num_first, num_second = int((leaning > 1e-12).sum()), int((leaning < -1e-12).sum())
    p_value = stats.binomtest(num_first, num_first + num_second).pvalue if num_first + num_second else 1.0
    both = slots.shape[1] == 2
    return PositionBias(
        num_calls=int(decided.sum()) * slots.shape[1],
        undecided=int(np.isnan(slots).sum()),
        first_share=interval.value,
        low=interval.low,
        high=interval.high,
        first_twice=int((slots == 1).all(axis=1).sum()) if both else 0,
        second_twice=int((slots == 0).all(axis=1).sum()) if both else 0,
        p_value=float(p_value),
        consistency=agreement(slots[:, 0], 1 - slots[:, 1], prompt_ids, confidence) if both else None,
    )
