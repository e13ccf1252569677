"""Summarise the judgments on one system against another: win rate, length-controlled win rate, position bias.

The numbers come from `eval.statistics`. This module converts judgments to its inputs, and gives the reason where a
number is not defined.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from statistics import fmean
from typing import TypeVar

from eval.judging.verdict import STATUSES, Judgment, Status
from eval.statistics.length_control import LengthControlled, length_controlled_win_rate
from eval.statistics.position_bias import PositionBias, position_bias
from eval.statistics.win_rate import WinRate, win_rate

Result = TypeVar("Result")


@dataclass(frozen=True)
class Suspected:
    """Responses that look like attempts to sway the judge, and what they won."""

    responses: int
    score: float
    "Sum of their scores, undecided matchups left out."


@dataclass(frozen=True)
class JudgedStatistics:
    """System a against system b. Ready for JSON by `dataclasses.asdict`: undefined numbers are None, never nan."""

    num_comparisons: int
    undecided: int
    statuses: dict[Status, int]
    "Number of verdicts by outcome; a matchup has one for each order."
    win_rate: WinRate | None
    "Of system a; None when nothing is decided."
    win_rate_missing: str | None
    "Why there is no win rate, None when there is one; the same below."
    length_controlled: LengthControlled | None
    length_controlled_missing: str | None
    position_bias: PositionBias | None
    "Contains `.consistency`: the share with the same verdict in both orders; None when one order was asked."
    position_bias_missing: str | None
    mean_length_a: float | None
    "Characters, over all matchups."
    mean_length_b: float | None
    suspected_a: Suspected
    suspected_b: Suspected


def judged_statistics(judgments: Sequence[Judgment], confidence: float = 0.95) -> JudgedStatistics:
    """Compute all numbers of one system against another, with intervals that count each prompt once.

    A number that is not defined (nothing decided, too few or too uniform lengths) is None, next to its reason.
    Raises ValueError for judgments on more than one pair of systems.
    """
    pairs = {(judgment.system_a, judgment.system_b) for judgment in judgments}
    if len(pairs) > 1:
        raise ValueError(f"judgments on several pairs of systems cannot be pooled: {sorted(pairs)}")
    prompts = [judgment.prompt_id for judgment in judgments]
    scores = [math.nan if judgment.score is None else judgment.score for judgment in judgments]
    lengths_a = [judgment.length_a for judgment in judgments]
    lengths_b = [judgment.length_b for judgment in judgments]
    rate, no_rate = _if_defined(lambda: win_rate(scores, prompts, confidence))
    controlled, no_control = _if_defined(
        lambda: length_controlled_win_rate(scores, lengths_a, lengths_b, prompts, confidence)
    )
    bias, no_bias = _if_defined(lambda: position_bias(_slots(judgments), prompts, confidence))
    statuses = Counter(status for judgment in judgments for status in judgment.statuses)
    return JudgedStatistics(
        num_comparisons=len(judgments),
        undecided=sum(judgment.score is None for judgment in judgments),
        statuses={status: statuses[status] for status in STATUSES},
        win_rate=rate,
        win_rate_missing=no_rate,
        length_controlled=controlled,
        length_controlled_missing=no_control,
        position_bias=bias,
        position_bias_missing=no_bias,
        mean_length_a=fmean(lengths_a) if judgments else None,
        mean_length_b=fmean(lengths_b) if judgments else None,
        suspected_a=_suspected([j.score for j in judgments if j.suspected_a]),
        suspected_b=_suspected(
            [None if j.score is None else 1 - j.score for j in judgments if j.suspected_b]
        ),
    )


def _if_defined(statistic: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Return a statistic, or the reason why it is not defined."""
    try:
        return _without_nan(statistic()), None
    except ValueError as error:
        return None, str(error)


def _without_nan(result: Result) -> Result:
    changes = {}
    for field in fields(result):
        value = getattr(result, field.name)
        if is_dataclass(value):
            changes[field.name] = _without_nan(value)
        elif isinstance(value, float) and math.isnan(value):
            changes[field.name] = None
    return replace(result, **changes)


def _slots(judgments: Sequence[Judgment]) -> list[tuple[float | None, ...]]:
    """Return (n, 2), or (n, 1) where one order was asked; None where a run was stopped in between."""
    # Both orders were to be asked where there are two verdicts, or one that did not suffice for a score.
    both = any(
        len(j.first_slot_wins) == 2 or (j.score is None and None not in j.first_slot_wins) for j in judgments
    )
    return [(*j.first_slot_wins, None)[:2] if both else j.first_slot_wins for j in judgments]


def _suspected(scores: Sequence[float | None]) -> Suspected:
    return Suspected(len(scores), sum(score for score in scores if score is not None))


# --- text -----------------------------------------------------------------------------------------------


def statistics_text(statistics: JudgedStatistics, system: str, baseline: str) -> str:
    """Format the numbers on a few lines."""
    if statistics.num_comparisons == 0:
        return f"{system} against {baseline}: no verdicts"
    rate, length, bias = statistics.win_rate, statistics.length_controlled, statistics.position_bias
    counts = "" if rate is None else f"{rate.wins} won, {rate.ties} tied, {rate.losses} lost, "
    lines = [
        f"{system} against {baseline}: {statistics.num_comparisons} comparisons, "
        f"{counts}{statistics.undecided} undecided"
    ]
    if rate is None:
        lines.append(f"no win rate: {statistics.win_rate_missing}")
    else:
        line = f"win rate {_interval(rate.rate, rate.low, rate.high)} over {rate.num_prompts} prompts"
        if statistics.undecided:
            worst, best = f"{rate.worst_case:.1%}", f"{rate.best_case:.1%}"
            line += f"; {worst} if {system} lost all that is undecided, {best} if it won it"
        lines.append(line)
    if length is None and rate is not None:
        lines.append(f"no win rate at equal length: {statistics.length_controlled_missing}")
    if length is not None:
        lines.append(f"win rate at equal length {_interval(length.rate, length.low, length.high)}")
        lines += [f"  but: {warning}" for warning in length.warnings]
    lines.append(
        f"mean length in characters: {system} {statistics.mean_length_a:.0f}, "
        f"{baseline} {statistics.mean_length_b:.0f}"
    )
    if bias is not None:
        same = bias.consistency
        if same is not None:
            lines.append(f"same verdict in both orders: {_interval(same.agreement, same.low, same.high)}")
        lines.append(
            f"first slot wins: {_interval(bias.first_share, bias.low, bias.high)}, "
            f"p = {bias.p_value:.2g} for no taste for a slot"
        )
    lines.append("verdicts: " + ", ".join(f"{count} {s}" for s, count in statistics.statuses.items()))
    for name, suspected in ((system, statistics.suspected_a), (baseline, statistics.suspected_b)):
        if suspected.responses:
            lines.append(
                f"{suspected.responses} responses of {name} look like attempts to sway the judge; "
                f"they won {suspected.score:g}"
            )
    return "\n".join(lines)


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.1%} [{low:.1%}, {high:.1%}]"
