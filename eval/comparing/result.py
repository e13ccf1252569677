"""What a comparison of several systems found, as the JSON that report.html and report.md are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from eval.comparing.examples import examples_of
from eval.comparing.systems import KL, LC_WIN_RATE, WIN_RATE, Measure, System
from eval.judging.judged_statistics import JudgedStatistics, judged_statistics
from eval.judging.verdict import Judgment
from eval.statistics.across_runs import Measured, difference, measured, widened_by_runs
from eval.statistics.bradley_terry import bradley_terry
from eval.statistics.frontier import frontier
from eval.statistics.intervals import Interval
from eval.statistics.win_rate import holm

NO_DIFFERENCE = dict.fromkeys(("difference", "low", "high", "p_value", "over", "detectable")) | {
    "num_prompts": 0
}


def compare_systems(
    systems: Sequence[System],
    measures: Sequence[Measure],
    baseline: str,
    setting_name: str,
    more_judgments: Sequence[Judgment] = (),
    num_examples: int | None = None,
) -> dict[str, Any]:
    """Table, tests, ranking, frontiers, curves and examples; what describes the run itself is the caller's to add.

    `more_judgments` are those of systems against each other, which count in the ranking. `num_examples` limits the
    prompts that have examples, the same for all systems.
    """
    rows = [_system_row(system, measures) for system in systems]
    return {
        "baseline": baseline,
        "measures": [_measure_row(measure) for measure in measures],
        "systems": rows,
        "tests": _tests([system for system in systems if system.values(WIN_RATE)]),
        "matches": _matches(more_judgments),
        "ranking": _ranking(systems, baseline, more_judgments),
        "frontiers": _frontiers(rows, measures),
        "curves": _curves(rows, measures, setting_name),
        "examples": examples_of(systems, _named(systems, baseline), num_examples),
        "rollouts": [
            {"system": system.name, **rollout}
            for system in systems
            for run in system.runs
            for rollout in run.rollouts
        ],
        "configs": {
            f"{system.name}/{index}": run.config
            for system in systems
            for index, run in enumerate(system.runs)
            if run.config is not None
        },
        "hashes": {
            f"{system.name}/{index}": dict(run.hashes)
            for system in systems
            for index, run in enumerate(system.runs)
            if run.hashes
        },
    }


def _named(systems: Sequence[System], name: str) -> System:
    found = next((system for system in systems if system.name == name), None)
    if found is None:
        raise ValueError(
            f"the baseline {name!r} is not among the systems: {', '.join(s.name for s in systems)}"
        )
    return found


def _measure_row(measure: Measure) -> dict[str, Any]:
    return {name: getattr(measure, name) for name in ("key", "name", "unit", "digits", "better", "help")}


# --- a row of the table ---------------------------------------------------------------------------------


def _system_row(system: System, measures: Sequence[Measure]) -> dict[str, Any]:
    judgments = [judgment for run in system.runs for judgment in run.judgments]
    statistics = judged_statistics(judgments) if judgments else None
    values: dict[str, Any] = {}
    warnings: list[str] = []
    for measure in measures:
        try:
            value = _value(system, measure, statistics, warnings)
        except ValueError as error:
            value = None
            warnings.append(f"{measure.name}: {error}")
        values[measure.key] = None if value is None else asdict(value)
    return {
        "name": system.name,
        "method": system.method,
        "setting": system.setting,
        "policies": [run.source for run in system.runs],
        "num_runs": len(system.runs),
        "num_prompts": len({row.prompt_id for run in system.runs for row in run.rows}),
        "values": values,
        "judged": None if statistics is None else _judged_row(statistics),
        "warnings": warnings,
    }


def _value(
    system: System, measure: Measure, statistics: JudgedStatistics | None, warnings: list[str]
) -> Measured | None:
    if measure.key == LC_WIN_RATE:
        return None if statistics is None else _length_controlled(system, statistics, warnings)
    values = system.values(measure.key)
    return measured(values, measure.bounds, measure.floor) if values else None


def _length_controlled(system: System, statistics: JudgedStatistics, warnings: list[str]) -> Measured:
    """Of all runs together; the spread of the runs' own rates makes the interval wider."""
    pooled = statistics.length_controlled
    if pooled is None:
        raise ValueError(statistics.length_controlled_missing)
    warnings += [f"LC win rate: {warning}" for warning in pooled.warnings]
    runs = [pooled]
    if len(system.runs) > 1:
        own = [judged_statistics(run.judgments) for run in system.runs]
        for index, each in enumerate(own):
            if each.length_controlled is None:
                raise ValueError(f"run {index}: {each.length_controlled_missing}")
        runs = [each.length_controlled for each in own]
    interval = Interval(pooled.rate, pooled.low, pooled.high, 0, pooled.method)
    return widened_by_runs(interval, [run.rate for run in runs])


def _judged_row(statistics: JudgedStatistics) -> dict[str, Any]:
    rate, bias = statistics.win_rate, statistics.position_bias
    same = None if bias is None else bias.consistency
    return {
        "wins": 0 if rate is None else rate.wins,
        "ties": 0 if rate is None else rate.ties,
        "losses": 0 if rate is None else rate.losses,
        "undecided": statistics.undecided,
        "worst_case": 0.0 if rate is None else rate.worst_case,
        "best_case": 1.0 if rate is None else rate.best_case,
        "consistent": None if same is None else same.agreement,
        "consistent_low": None if same is None else same.low,
        "consistent_high": None if same is None else same.high,
        "first_slot_wins": None if bias is None else bias.first_share,
        "first_slot_p": None if bias is None else bias.p_value,
        "statuses": dict(statistics.statuses),
    }


# --- systems beside each other --------------------------------------------------------------------------


def _tests(systems: Sequence[System]) -> list[dict[str, Any]]:
    """Every two systems by their win rates against the same baseline; p-values adjusted for their number."""
    tests = []
    for one, other in combinations(systems, 2):
        names = {"measure": WIN_RATE, "system_1": one.name, "system_2": other.name}
        try:
            result = difference(one.values(WIN_RATE), other.values(WIN_RATE))
            tests.append({**names, **asdict(result), "reason": None})
        except ValueError as error:
            tests.append({**names, **NO_DIFFERENCE, "reason": str(error)})
    done = [test for test in tests if test["p_value"] is not None]
    adjusted = iter(holm([test["p_value"] for test in done])) if done else iter(())
    return [{**t, "p_holm": None if t["p_value"] is None else float(next(adjusted))} for t in tests]


def _matches(judgments: Sequence[Judgment]) -> list[dict[str, Any]]:
    """Systems that were judged against each other: the win rate of the first one over all their runs."""
    pairs: dict[tuple[str, str], list[Judgment]] = {}
    for judgment in judgments:
        pairs.setdefault((judgment.system_a, judgment.system_b), []).append(judgment)
    matches = []
    for (one, other), own in pairs.items():
        rate = judged_statistics(own).win_rate
        counts = ("wins", "ties", "losses", "undecided", "num_prompts")
        found = (
            dict.fromkeys(("value", "low", "high"))
            if rate is None
            else {
                "value": rate.rate,
                "low": rate.low,
                "high": rate.high,
                **{name: getattr(rate, name) for name in counts},
            }
        )
        none = dict.fromkeys(counts, 0) | {"undecided": len(own)}
        matches.append({"system_1": one, "system_2": other, **none, **found})
    return matches


def _ranking(
    systems: Sequence[System], baseline: str, more_judgments: Sequence[Judgment]
) -> dict[str, Any] | None:
    judgments = [j for system in systems for run in system.runs for j in run.judgments] + list(more_judgments)
    decided = [judgment for judgment in judgments if judgment.score is not None]
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
        none = {"systems": [], "anchor": baseline, "num_comparisons": len(decided)}
        return none | {"warnings": [f"no ranking: {error}"]}
    columns = (result.systems, result.elo, result.elo_low, result.elo_high)
    return {
        "systems": [
            {"name": name, "elo": float(elo), "low": float(low), "high": float(high)}
            for name, elo, low, high in zip(*columns, strict=True)
        ],
        "anchor": baseline,
        "num_comparisons": result.num_comparisons,
        "warnings": list(result.warnings),
    }


def _frontiers(rows: Sequence[Mapping[str, Any]], measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """For each reward: every system that has a KL, and whether another one has more reward for no more KL."""
    frontiers = []
    for measure in measures:
        placed = [row for row in rows if row["values"].get(KL) and row["values"][measure.key]]
        if not measure.is_reward or not placed:
            continue
        points = frontier(
            [row["name"] for row in placed],
            [Measured(**row["values"][KL]).interval for row in placed],
            [Measured(**row["values"][measure.key]).interval for row in placed],
        )
        by_name = {point.system: point for point in points}
        frontiers.append(
            {
                "reward": measure.key,
                "points": [
                    {
                        "system": row["name"],
                        "method": row["method"],
                        "kl": _limits(row["values"][KL]),
                        "reward": _limits(row["values"][measure.key]),
                        "on_front": by_name[row["name"]].on_front,
                    }
                    for row in placed
                ],
            }
        )
    return frontiers


def _curves(
    rows: Sequence[Mapping[str, Any]], measures: Sequence[Measure], setting_name: str
) -> list[dict[str, Any]]:
    """Each reward and the KL over the setting, for the methods that have several settings."""
    curves = []
    for measure in measures:
        if not (measure.is_reward or measure.key == KL):
            continue
        placed = [row for row in rows if row["setting"] is not None and row["values"][measure.key]]
        points = []
        for method in dict.fromkeys(row["method"] for row in placed):
            own = sorted((row for row in placed if row["method"] == method), key=lambda row: row["setting"])
            if len(own) > 1:
                points += [_point(row, measure.key) for row in own]
        if points:
            curves.append({"setting": setting_name, "measure": measure.key, "points": points})
    return curves


def _point(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    where = {"system": row["name"], "method": row["method"], "setting": row["setting"]}
    return where | _limits(row["values"][key])


def _limits(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value[name] for name in ("value", "low", "high")}
