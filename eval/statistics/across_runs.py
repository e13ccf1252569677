"""One estimate of a system over its runs: a value per training seed and prompt, with a matching interval.

With one run only the prompts are random. With several runs the training seeds are too; an interval over prompts alone
would then hold for these checkpoints, not for the method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from eval.statistics.intervals import Interval, mean_interval, prompt_codes, rate_interval
from eval.statistics.sample_size import detectable_difference
from eval.statistics.seeds import Difference, seed_difference, seed_interval
from eval.statistics.win_rate import paired_test


@dataclass(frozen=True)
class Measured:
    """A system's value of one measure, with its interval if there is one.

    `runs` are the values of its runs; limits are None without an interval.
    `method` names what was resampled or assumed: that of `eval.statistics.intervals` for one run, "seeds" for several.
    """

    value: float
    low: float | None
    high: float | None
    runs: tuple[float, ...]
    method: str


@dataclass(frozen=True)
class Values:
    """One number for each response of one run; nan where it is unknown."""

    prompt_ids: tuple[str, ...]
    numbers: NDArray[np.float64]

    def __post_init__(self) -> None:
        if len(self.prompt_ids) != len(self.numbers):
            raise ValueError(
                f"{len(self.numbers)} numbers of {len(self.prompt_ids)} prompts; give one for each"
            )


def run_matrix(runs: Sequence[Values]) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Return the prompts sorted by id (P,), and each run's mean on each prompt (S, P); nan without a number."""
    prompt_ids = tuple(sorted({prompt_id for run in runs for prompt_id in run.prompt_ids}))
    column = {prompt_id: index for index, prompt_id in enumerate(prompt_ids)}
    matrix = np.full((len(runs), len(prompt_ids)), np.nan)
    for means, run in zip(matrix, runs, strict=True):
        known = ~np.isnan(run.numbers)
        columns = np.array([column[prompt_id] for prompt_id in run.prompt_ids], dtype=np.intp)[known]
        sums = np.bincount(columns, weights=run.numbers[known], minlength=len(prompt_ids))
        counts = np.bincount(columns, minlength=len(prompt_ids))
        np.divide(sums, counts, out=means, where=counts > 0)
    return prompt_ids, matrix


def measured(
    runs: Sequence[Values], bounds: tuple[float, float] | None = None, floor: float = -math.inf
) -> Measured:
    """Compute the mean over runs and prompts, its interval over prompts for one run, else over seeds and prompts.

    `bounds` are the limits of the scale; (0, 1) gives Wilson's interval for one run. The lower limit is not below
    `floor`, such as 0 for a KL, unless the value itself is. Raises ValueError when a run has no numbers.
    """
    _, matrix = run_matrix(runs)
    empty = np.flatnonzero(np.isnan(matrix).all(axis=1)).tolist()
    if empty:
        raise ValueError(f"runs {empty} have no number at all")
    means = tuple(np.nanmean(matrix, axis=1).tolist())
    if matrix.shape[1] == 1:
        return Measured(float(np.mean(means)), None, None, means, "one prompt")
    if len(runs) > 1:
        interval = seed_interval(matrix, bounds)
    elif bounds == (0.0, 1.0):
        interval = rate_interval(runs[0].numbers, prompt_codes(runs[0].prompt_ids, len(runs[0].numbers)))
    else:
        interval = mean_interval(matrix[0, ~np.isnan(matrix[0])], bounds=bounds)
    low = max(interval.low, min(floor, interval.value))
    return Measured(interval.value, low, interval.high, means, interval.method)


def widened_by_runs(
    interval: Interval, runs: Sequence[float], bounds: tuple[float, float] = (0.0, 1.0)
) -> Measured:
    """Widen a pooled interval over prompts by the spread between runs.

        half^2 = (limit - value)^2 + (t_{S-1} s / sqrt(S))^2

    For statistics that are not means over prompts, such as a length-controlled rate. The effect of the prompts on each
    run is counted twice, so the interval is conservative. With one run it is unchanged. Clipped to `bounds`.
    """
    if len(runs) < 2:
        return Measured(interval.value, interval.low, interval.high, tuple(runs), interval.method)
    spread = stats.t.isf(0.025, len(runs) - 1) * float(np.std(runs, ddof=1)) / math.sqrt(len(runs))
    low = max(interval.value - math.hypot(interval.value - interval.low, spread), bounds[0])
    high = min(interval.value + math.hypot(interval.high - interval.value, spread), bounds[1])
    return Measured(interval.value, low, high, tuple(runs), "widened by seeds")


def difference(runs_1: Sequence[Values], runs_2: Sequence[Values]) -> Difference:
    """Compute the difference of two systems' scores in [0, 1] on their shared prompts.

    If both have several runs: `seed_difference`. Otherwise, and where all runs of each have the same constant score,
    `paired_test` of the means over runs, which holds for these checkpoints only. Raises the ValueErrors of these two.
    """
    prompts_1, matrix_1 = run_matrix(runs_1)
    prompts_2, matrix_2 = run_matrix(runs_2)
    shared, columns_1, columns_2 = np.intersect1d(prompts_1, prompts_2, return_indices=True)
    if not len(shared):
        raise ValueError("the two systems share no prompts")
    matrix_1, matrix_2 = matrix_1[:, columns_1], matrix_2[:, columns_2]
    if len(runs_1) > 1 and len(runs_2) > 1 and (_varies(matrix_1) or _varies(matrix_2)):
        return seed_difference(matrix_1, matrix_2)
    # nan where a run has no number: the levels of runs differ
    scores_1, scores_2 = matrix_1.mean(axis=0), matrix_2.mean(axis=0)
    test = paired_test(scores_1, scores_2)
    sd = float(np.nanstd(scores_1 - scores_2, ddof=1)) if test.num_prompts > 1 else 0.0
    detectable = detectable_difference(test.num_prompts, sd) if sd > 0 else None
    limits = test.low, test.high
    return Difference(test.difference, *limits, test.p_value, test.num_prompts, "prompts", detectable)


def _varies(matrix: NDArray[np.float64]) -> bool:
    decided = matrix[~np.isnan(matrix)]
    return len(decided) == 0 or float(np.ptp(decided)) > 1e-12
