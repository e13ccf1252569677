"""RewardBench 2's score of Ties: right responses above wrong ones, and closer to each other than to these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from eval.statistics.intervals import without_nan


@dataclass(frozen=True)
class Margins:
    """Of one prompt: lowest right minus highest wrong score, and highest minus lowest right (None for one right)."""

    gap: float
    spread: float | None

    @property
    def is_right(self) -> bool:
        """Whether every right response scores above every wrong one."""
        return self.gap > 0


@dataclass(frozen=True)
class TiesScore:
    """The score and its parts; `gap_exceeds_spread` and `both_gaps_exceed` are over prompts of both kinds."""

    ref_accuracy: float
    tied_accuracy: float
    gap_exceeds_spread: float
    both_gaps_exceed: float
    margin: float
    overall: float


def margins_of(right: ArrayLike, wrong: ArrayLike) -> Margins:
    """Compute gap and spread from the scores of a prompt's right and wrong responses, one or more each."""
    right, wrong = without_nan(right, "right"), without_nan(wrong, "wrong")
    spread = float(np.ptp(right)) if len(right) > 1 else None
    return Margins(float(right.min() - wrong.max()), spread)


def ties_score(ref: Mapping[str, Margins], tied: Mapping[str, Margins]) -> TiesScore:
    """Compute the score of prompts with several right responses (`tied`) and their counterparts with one (`ref`).

        overall = 0.3 A_tied + 0.3 A_ref + 0.2 P(g > s) + 0.2 P(g' > s) + 0.01 mean tanh(g'/s - 1)

    A is the share of prompts on which every right response scores above every wrong one; g and s are gap and spread
    of a tied prompt and g' the smaller gap of it and its counterpart, over the prompts that both have with a spread;
    the last mean is over s > 0. A mean over no prompts is 0. Keys are prompts. Source: Malik et al. 2025 (RewardBench
    2), as computed by the package rewardbench 0.1.4.
    """
    pairs = [(tied[name], ref[name]) for name in tied if name in ref]
    spread = np.array([one.spread for one, _ in pairs if one.spread is not None])
    gap = np.array([one.gap for one, _ in pairs if one.spread is not None])
    smaller = np.array([min(one.gap, other.gap) for one, other in pairs if one.spread is not None])
    positive = spread > 0
    parts = {
        "ref_accuracy": _mean([each.is_right for each in ref.values()]),
        "tied_accuracy": _mean([each.is_right for each in tied.values()]),
        "gap_exceeds_spread": _mean(gap > spread),
        "both_gaps_exceed": _mean(smaller > spread),
        "margin": _mean(np.tanh(smaller[positive] / spread[positive] - 1)),
    }
    weights = dict(zip(parts, (0.3, 0.3, 0.2, 0.2, 0.01), strict=True))
    return TiesScore(**parts, overall=sum(weights[name] * value for name, value in parts.items()))


def _mean(values: ArrayLike) -> float:
    return float(np.mean(values)) if len(values) else 0.0
