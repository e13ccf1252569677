"""Accuracy of a score on preference pairs, in all and by group; ties are counted apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval.statistics.intervals import Interval, prompt_codes, rate_interval, same_rows, without_nan


@dataclass(frozen=True)
class PairAccuracy:
    """Outcomes of n pairs, and the accuracy with its interval.

    `accuracy` averages the pairs of each prompt first, and counts a tie as one half. `of_pairs` is the same share with
    every pair counted once; `strict_of_pairs` also counts a tie as wrong.
    """

    n: int
    right: int
    ties: int
    wrong: int
    accuracy: Interval
    of_pairs: float
    strict_of_pairs: float


def outcomes(margins: ArrayLike) -> NDArray[np.float64]:
    """Return 1 for a margin (n,) above 0, 0 below it, and 0.5 for exactly 0, a tie. Raises ValueError on nan."""
    return (np.sign(without_nan(margins, "margins")) + 1) / 2


def pair_accuracy(
    margins: ArrayLike, prompt_ids: ArrayLike | None = None, confidence: float = 0.95
) -> PairAccuracy:
    """Compute the accuracy of n pairs from margins (n,), the score of the chosen minus that of the rejected response.

        accuracy = mean over prompts of mean over the prompt's pairs of (1[margin > 0] + 1[margin = 0] / 2)

    The interval is Wilson's, and where prompts have several pairs or there are ties, Wilson's at the effective sample
    size (`eval.statistics.intervals.rate_interval`). `prompt_ids` (n,): the prompt of each pair; None where each has
    its own. Raises ValueError on no pairs or nan.
    """
    scores = outcomes(margins)
    right, wrong = int((scores == 1).sum()), int((scores == 0).sum())
    interval = rate_interval(scores, prompt_codes(prompt_ids, len(scores)), confidence)
    ties = len(scores) - right - wrong
    return PairAccuracy(len(scores), right, ties, wrong, interval, float(scores.mean()), right / len(scores))


def accuracy_by(
    margins: ArrayLike,
    groups: Sequence[str],
    prompt_ids: ArrayLike | None = None,
    confidence: float = 0.95,
) -> dict[str, PairAccuracy]:
    """Compute `pair_accuracy` of the pairs of each group, in the order in which the groups first appear.

    Errors are those of `pair_accuracy`, and a ValueError on unequal lengths.
    """
    margins = without_nan(margins, "margins")
    codes, groups = prompt_codes(prompt_ids, len(margins)), np.asarray(groups, dtype=object)
    same_rows({"margins": len(margins), "groups": len(groups)})
    members = {group: groups == group for group in dict.fromkeys(groups)}
    return {group: pair_accuracy(margins[mask], codes[mask], confidence) for group, mask in members.items()}


def equal_mass_bins(values: ArrayLike, num_bins: int) -> NDArray[np.intp]:
    """Return the bin (n,) of each value, from 0: at most `num_bins` bins of about equally many values, in order.

    Bins are cut at the quantiles k / num_bins; a value at a cut is in the lower bin, so equal values are never
    separated, and where there are many of them there are fewer bins. Raises ValueError on nan or no bins.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    values = without_nan(values, "values")
    cuts = np.quantile(values, np.arange(1, num_bins) / num_bins)
    return np.unique(np.searchsorted(cuts, values, side="left"), return_inverse=True)[1]


def number_groups(values: ArrayLike, num_bins: int) -> list[str]:
    """Name the group of each number (n,): the number itself if there are at most `num_bins`, else its bin's range."""
    values = without_nan(values, "values")
    if len(np.unique(values)) <= num_bins:
        return [_named(value) for value in values]
    bins = equal_mass_bins(values, num_bins)
    ranges = [(values[bins == code].min(), values[bins == code].max()) for code in range(bins.max() + 1)]
    names = [_named(low) if low == high else f"{_named(low)} to {_named(high)}" for low, high in ranges]
    return [names[code] for code in bins]


def _named(value: float) -> str:
    """Return a number as text that no other number has."""
    return repr(float(value)).removesuffix(".0")
