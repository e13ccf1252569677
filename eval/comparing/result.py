"""The findings of a comparison of several systems, from which report.html and report.md are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from itertools import combinations
from operator import attrgetter

from eval.comparing.examples import examples_of
from eval.comparing.systems import KL, LC_WIN_RATE, WIN_RATE, Measure, System
from eval.judging.judged_statistics import JudgedStatistics, judged_statistics
from eval.judging.verdict import Judgment
from eval.reporting.comparison import (
    Curve,
    CurvePoint,
    DifferenceRow,
    Estimate,
    Findings,
    Frontier,
    FrontierRow,
    JudgedRow,
    MatchRow,
    MeasureRow,
    RankedSystem,
    Ranking,
    RolloutRow,
    RunsEstimate,
    SystemRow,
)
from eval.statistics.across_runs import Measured, difference, measured, widened_by_runs
from eval.statistics.bradley_terry import bradley_terry, elo
from eval.statistics.frontier import pareto_front
from eval.statistics.intervals import Interval
from eval.statistics.win_rate import holm


def compare_systems(
    systems: Sequence[System],
    measures: Sequence[Measure],
    baseline: str,
    setting_name: str,
    more_judgments: Sequence[Judgment] = (),
    num_examples: int | None = None,
) -> Findings:
    """Compute table, tests, ranking, frontiers, curves and examples.

    Args:
        systems: The systems with their measured and judged runs.
        measures: Columns of the table.
        baseline: Name of the system that the others are judged against.
        setting_name: Name of the number that `System.setting` contains.
        more_judgments: Judgments between systems other than the baseline, which count in the ranking.
        num_examples: Number of prompts with examples, the same for all systems; None for all.
    """
    by_name = {system.name: system for system in systems}
    if baseline not in by_name:
        raise ValueError(f"the baseline {baseline!r} is not among the systems: {', '.join(by_name)}")
    rows = tuple(_system_row(system, measures) for system in systems)
    runs = [(system, f"{system.name}/{i}", run) for system in systems for i, run in enumerate(system.runs)]
    return Findings(
        baseline=baseline,
        measures=tuple(
            MeasureRow(*(getattr(m, field.name) for field in fields(MeasureRow))) for m in measures
        ),
        systems=rows,
        tests=_tests([system for system in systems if system.values(WIN_RATE)]),
        matches=_matches(more_judgments),
        ranking=_ranking(systems, baseline, more_judgments),
        frontiers=_frontiers(rows, measures),
        curves=_curves(rows, measures, setting_name),
        examples=examples_of(systems, by_name[baseline], num_examples),
        rollouts=tuple(RolloutRow(system.name, **row) for system, _, run in runs for row in run.rollouts),
        configs={name: run.config for _, name, run in runs if run.config is not None},
        hashes={name: dict(run.hashes) for _, name, run in runs if run.hashes},
    )


# --- a row of the table ---------------------------------------------------------------------------------


def _system_row(system: System, measures: Sequence[Measure]) -> SystemRow:
    judgments = [judgment for run in system.runs for judgment in run.judgments]
    statistics = judged_statistics(judgments) if judgments else None
    values: dict[str, RunsEstimate | None] = {}
    warnings: list[str] = []
    for measure in measures:
        try:
            value = _value(system, measure, statistics, warnings)
        except ValueError as error:
            value = None
            warnings.append(f"{measure.name}: {error}")
        values[measure.key] = None if value is None else RunsEstimate(**asdict(value))
    return SystemRow(
        name=system.name,
        method=system.method,
        setting=system.setting,
        policies=tuple(run.source for run in system.runs),
        num_runs=len(system.runs),
        num_prompts=len({row.prompt_id for run in system.runs for row in run.rows}),
        values=values,
        judged=None if statistics is None else _judged_row(statistics),
        warnings=tuple(warnings),
    )


def _value(
    system: System, measure: Measure, statistics: JudgedStatistics | None, warnings: list[str]
) -> Measured | None:
    if measure.key == LC_WIN_RATE:
        return None if statistics is None else _length_controlled(system, statistics, warnings)
    values = system.values(measure.key)
    return measured(values, measure.bounds, measure.floor) if values else None


def _length_controlled(system: System, statistics: JudgedStatistics, warnings: list[str]) -> Measured:
    """Compute the length-controlled rate pooled over runs, its interval widened by the spread between runs."""
    pooled = statistics.length_controlled
    if pooled is None:
        raise ValueError(statistics.length_controlled_missing)
    warnings += [f"LC win rate: {warning}" for warning in pooled.warnings]
    by_run = [statistics]
    if len(system.runs) > 1:
        by_run = [judged_statistics(run.judgments) for run in system.runs]
    for index, single in enumerate(by_run):
        if single.length_controlled is None:
            raise ValueError(f"run {index}: {single.length_controlled_missing}")
    interval = Interval(pooled.rate, pooled.low, pooled.high, 0, pooled.method)
    return widened_by_runs(interval, [single.length_controlled.rate for single in by_run])


def _judged_row(statistics: JudgedStatistics) -> JudgedRow:
    rate, bias = statistics.win_rate, statistics.position_bias
    counts, bounds, first_slot, consistency = (0, 0, 0), (0.0, 1.0), (None, None), (None, None, None)
    if rate is not None:
        counts, bounds = (rate.wins, rate.ties, rate.losses), (rate.worst_case, rate.best_case)
    if bias is not None:
        first_slot, same = (bias.first_share, bias.p_value), bias.consistency
        consistency = consistency if same is None else (same.agreement, same.low, same.high)
    undecided, statuses = statistics.undecided, dict(statistics.statuses)
    return JudgedRow(*counts, undecided, *bounds, *consistency, *first_slot, statuses)


# --- comparisons between systems ------------------------------------------------------------------------


def _tests(systems: Sequence[System]) -> tuple[DifferenceRow, ...]:
    """Test all pairs of systems by their win rates against the baseline, with Holm-adjusted p-values."""
    nothing = dict.fromkeys(("difference", "low", "high", "p_value", "over", "detectable")) | {
        "num_prompts": 0
    }
    tests = []
    for one, other in combinations(systems, 2):
        try:
            result, reason = asdict(difference(one.values(WIN_RATE), other.values(WIN_RATE))), None
        except ValueError as error:
            result, reason = nothing, str(error)
        tests.append(DifferenceRow(WIN_RATE, one.name, other.name, **result, p_holm=None, reason=reason))
    p_values = [test.p_value for test in tests if test.p_value is not None]
    adjusted = iter(holm(p_values) if p_values else ())
    return tuple(t if t.p_value is None else replace(t, p_holm=float(next(adjusted))) for t in tests)


def _matches(judgments: Sequence[Judgment]) -> tuple[MatchRow, ...]:
    """Compute the win rate of the first of each two systems judged against each other, over all runs."""
    pairs: dict[tuple[str, str], list[Judgment]] = {}
    for judgment in judgments:
        pairs.setdefault((judgment.system_a, judgment.system_b), []).append(judgment)
    matches = []
    for names, group in pairs.items():
        rate = judged_statistics(group).win_rate
        if rate is None:
            matches.append(MatchRow(None, None, None, *names, 0, 0, 0, len(group), 0))
        else:
            counts = (rate.wins, rate.ties, rate.losses, rate.undecided, rate.num_prompts)
            matches.append(MatchRow(rate.rate, rate.low, rate.high, *names, *counts))
    return tuple(matches)


def _ranking(systems: Sequence[System], baseline: str, more_judgments: Sequence[Judgment]) -> Ranking | None:
    judgments = [judgment for system in systems for run in system.runs for judgment in run.judgments]
    decided = [judgment for judgment in (*judgments, *more_judgments) if judgment.score is not None]
    if len({judgment.system_a for judgment in decided}) < 2 or len({j.prompt_id for j in decided}) < 2:
        return None
    try:
        result = bradley_terry(
            [judgment.system_a for judgment in decided],
            [judgment.system_b for judgment in decided],
            [judgment.score for judgment in decided],
            [judgment.prompt_id for judgment in decided],
            anchor=baseline,
        )
    except ValueError as error:  # such as two groups of systems that never met
        return Ranking((), baseline, len(decided), (f"no ranking: {error}",))
    columns = (elo(strengths).tolist() for strengths in (result.strengths, result.low, result.high))
    ranked = tuple(map(RankedSystem, result.systems, *columns))
    return Ranking(ranked, baseline, result.num_comparisons, tuple(result.warnings))


def _frontiers(rows: Sequence[SystemRow], measures: Sequence[Measure]) -> tuple[Frontier, ...]:
    """Collect, for each reward, the systems that have a KL, and mark those on the Pareto front."""
    frontiers = []
    for measure in measures:
        measured_rows = [row for row in rows if row.values.get(KL) and row.values[measure.key]]
        if not measure.is_reward or not measured_rows:
            continue
        kls, rewards = (
            [Estimate(*_limits(row.values[key])) for row in measured_rows] for key in (KL, measure.key)
        )
        on_front = pareto_front([kl.value for kl in kls], [reward.value for reward in rewards]).tolist()
        points = [
            FrontierRow(row.name, row.method, kl, reward, best)
            for row, kl, reward, best in zip(measured_rows, kls, rewards, on_front, strict=True)
        ]
        frontiers.append(Frontier(measure.key, tuple(points)))
    return tuple(frontiers)


def _curves(rows: Sequence[SystemRow], measures: Sequence[Measure], setting_name: str) -> tuple[Curve, ...]:
    """Collect each reward and the KL as functions of the setting, for methods with several settings."""
    curves = []
    for measure in measures:
        if not (measure.is_reward or measure.key == KL):
            continue
        measured_rows = [row for row in rows if row.setting is not None and row.values[measure.key]]
        points = []
        for method in dict.fromkeys(row.method for row in measured_rows):
            line = sorted((row for row in measured_rows if row.method == method), key=attrgetter("setting"))
            if len(line) > 1:
                points += [
                    CurvePoint(*_limits(row.values[measure.key]), row.name, row.method, row.setting)
                    for row in line
                ]
        if points:
            curves.append(Curve(setting_name, measure.key, tuple(points)))
    return tuple(curves)


def _limits(estimate: Estimate) -> tuple[float | None, float | None, float | None]:
    return estimate.value, estimate.low, estimate.high
