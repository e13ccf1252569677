"""The systems of a comparison: the responses of their runs, the measures of these, and the verdicts on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eval.completions.rows import CompletionRow
from eval.completions.text_metrics import ROUGES, rouge_of_rows
from eval.judging.verdict import Judgment, Verdict
from eval.reporting.comparison import MeasureRow
from eval.statistics.across_runs import Values

WIN_RATE, LC_WIN_RATE, KL = "win_rate", "lc_win_rate", "kl"


@dataclass(frozen=True)
class Measure(MeasureRow):
    """A column of the table, with the parameters of its interval."""

    bounds: tuple[float, float] | None = None
    is_reward: bool = False
    "Whether it goes on the frontier, against the KL."
    floor: float = -math.inf
    "Lower bound of the true value, where the scale has no upper limit."


def measures_of(baseline: str, judged: bool, has_kl: bool, rewards: Sequence[str]) -> list[Measure]:
    """Return the columns in order. `rewards` are the keys of `Run.values` that contain a reward."""
    measures = []
    if judged:
        preferred = (
            f"Share of the prompts on which the judge prefers the response to that of {baseline}; a tie is "
            "half a win. What the judge did not decide is left out, and bounded in the table of verdicts."
        )
        controlled = (
            "Length-controlled: the win rate that a logistic regression expects at responses of equal length."
        )
        measures.append(Measure(WIN_RATE, "win rate", "%", 1, "high", preferred, (0.0, 1.0), True))
        measures.append(Measure(LC_WIN_RATE, "LC win rate", "%", 1, "high", controlled, (0.0, 1.0)))
    for key in rewards:
        name = "reward-model score" if key == "reward_model" else key.replace("_", " ")
        measures.append(Measure(key, name, "", 2, "high", f"Mean {name} of the responses.", None, True))
    if has_kl:
        text = (
            "KL of the policy to its reference over whole responses: the mean of log pi(y|x) - log pi_ref(y|x) "
            "over responses sampled at temperature 1."
        )
        measures.append(Measure(KL, "KL", "nats", 2, None, text, floor=0.0))
    for key, name in zip(ROUGES, ("ROUGE-1", "ROUGE-2", "ROUGE-L"), strict=True):
        text = f"F1 of {name} against the dataset's own response, in percent."
        measures.append(Measure(key, name, "%", 1, "high", text, (0.0, 1.0)))
    length = "Tokens of a response, the stop token included."
    ended = "Share of the responses that came to their end and were not cut at the length limit."
    measures.append(Measure("num_tokens", "length", "tokens", 1, None, length, floor=0.0))
    measures.append(Measure("ended", "ended", "%", 1, None, ended, (0.0, 1.0)))
    return measures


@dataclass(frozen=True)
class Run:
    """One checkpoint (or file) of a system."""

    source: str
    "The policy's folder or hub id, or the file of the responses."
    rows: Sequence[CompletionRow]
    values: Mapping[str, Values] = field(default_factory=dict)
    "By the key of a measure."
    verdicts: Sequence[Verdict] = ()
    "On the comparisons with the baseline."
    judgments: Sequence[Judgment] = ()
    answers: Mapping[tuple[str, int, str], str] = field(default_factory=dict)
    "The judge's raw answers, by (prompt_id, seed, order)."
    sampled: bool = True
    "Whether the rows are samples at temperature 1, on which the KL was measured."
    hashes: Mapping[str, Any] = field(default_factory=dict)
    config: str | None = None
    "The recipe of the training run, if it is in the policy's parent folder."
    rollouts: Sequence[Mapping[str, Any]] = ()
    "Training rollouts: rows of `drpo.rollout.samples.rollout_samples`, with their step."


@dataclass(frozen=True)
class System:
    """A row of the table: a method, a setting of it, or a step of its training, in one or several runs."""

    name: str
    method: str
    setting: float | None
    runs: tuple[Run, ...]

    def values(self, key: str) -> tuple[Values, ...]:
        """Return the measure of every run; empty when one of them lacks it."""
        values = tuple(run.values.get(key) for run in self.runs)
        return () if None in values else values


def text_values(rows: Sequence[CompletionRow]) -> dict[str, Values]:
    """Compute the text metrics, without those that no row has; ROUGE not for the references themselves."""
    prompt_ids = tuple(row.prompt_id for row in rows)
    numbers = {
        "num_tokens": np.array([row.num_tokens for row in rows], dtype=np.float64),
        "ended": np.array([row.ended for row in rows], dtype=np.float64),
        **rouge_of_rows(rows),
    }
    return {key: Values(prompt_ids, column) for key, column in numbers.items() if not np.isnan(column).all()}


def judged_values(judgments: Sequence[Judgment]) -> Values:
    """Return the score of each comparison; nan where it is undecided."""
    scores = np.array([judgment.score for judgment in judgments], dtype=np.float64)
    return Values(tuple(judgment.prompt_id for judgment in judgments), scores)
