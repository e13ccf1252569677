"""Distributions of scores, and the agreement of several reward models on the same pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from eval.statistics.agreement import Agreement, agreement
from eval.statistics.intervals import Interval, mean_interval, prompt_codes, prompt_means, without_nan
from eval.statistics.pair_accuracy import outcomes
from eval.statistics.seeds import seed_interval

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class Distribution:
    """Mean, standard deviation (divisor n - 1; None for one score) and quantiles of n scores."""

    n: int
    mean: float
    deviation: float | None
    quantiles: dict[str, float]


def distribution(scores: ArrayLike) -> Distribution:
    """Summarise scores (n,). Raises ValueError on no scores or nan."""
    scores = without_nan(scores, "scores")
    deviation = float(scores.std(ddof=1)) if len(scores) > 1 else None
    quantiles = {f"{q:g}": float(np.quantile(scores, q)) for q in QUANTILES}
    return Distribution(len(scores), float(scores.mean()), deviation, quantiles)


@dataclass(frozen=True)
class ModelAgreement:
    """Agreement of two reward models on n pairs: of the signs of their margins, and Spearman's of the margins.

    `signs.kappa` is agreement beyond chance, where chance is that of independent errors at the accuracies of the two.
    `spearman` is None where one has the same margin everywhere.
    """

    models: tuple[str, str]
    signs: Agreement
    spearman: float | None


def model_agreement(
    margins: Mapping[str, ArrayLike], prompt_ids: ArrayLike | None = None, confidence: float = 0.95
) -> list[ModelAgreement]:
    """Compare every two models by their margins (n,) on the same pairs.

    Sources: Cohen 1960; Geirhos et al. 2020 (kappa of errors); Spearman 1904. Raises ValueError on unequal lengths or
    nan.
    """
    results = []
    for one, other in combinations(margins, 2):
        pair = [without_nan(margins[name], name) for name in (one, other)]
        signs = agreement(*map(outcomes, pair), prompt_ids, confidence)
        constant = any(np.ptp(values) == 0 for values in pair)
        spearman = None if constant else float(stats.spearmanr(*pair).statistic)
        results.append(ModelAgreement((one, other), signs, spearman))
    return results


def accuracy_over_seeds(
    margins: Mapping[str, ArrayLike], prompt_ids: ArrayLike | None = None, confidence: float = 0.95
) -> Interval | None:
    """Compute the mean accuracy of models that differ in their seed, with an interval for new seeds and prompts.

    None for one model or one prompt. `margins` (n,) of each model on the same pairs; ties count one half. See
    `eval.statistics.seeds.seed_interval`.
    """
    scores = [outcomes(values) for values in margins.values()]
    codes = prompt_codes(prompt_ids, len(scores[0]))
    if len(scores) < 2 or len(np.unique(codes)) < 2:
        return None
    return seed_interval(np.stack([prompt_means(values, codes) for values in scores]), confidence=confidence)


def accuracy_gain(
    margins: ArrayLike,
    members: Mapping[str, ArrayLike],
    prompt_ids: ArrayLike | None = None,
    confidence: float = 0.95,
) -> Interval | None:
    """Compute the accuracy of an ensemble less the mean accuracy of its members, paired by prompt.

        gain = mean over prompts of mean over its pairs of (o_ensemble - mean_i o_i),    o: 1 right, 0 wrong, 1/2 tie

    `margins` (n,) are the ensemble's, `members` (n,) those of each member on the same pairs. The interval (BCa) is for
    new prompts with these members; None for one prompt. Raises ValueError on unequal lengths or nan.
    """
    codes = prompt_codes(prompt_ids, len(outcomes(margins)))
    if len(np.unique(codes)) < 2:
        return None
    others = np.mean([outcomes(values) for values in members.values()], axis=0)
    return mean_interval(outcomes(margins) - others, codes, confidence, (-1.0, 1.0))
