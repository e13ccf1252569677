"""The tables of a report as plain cells, for both the HTML page and the Markdown page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eval.judging.verdict import STATUSES
from eval.reporting.comparison import Comparison, DifferenceRow, Estimate, MeasureRow, RunsEstimate, SystemRow

NOTHING = "–"
SIGNIFICANT = 0.05
NAMED_AT_MOST = 3
"Maximum number of systems named in a note; more are counted."


@dataclass(frozen=True)
class Cell:
    """A text, smaller notes below it, and warnings below these."""

    text: str
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    strong: bool = False


@dataclass(frozen=True)
class Column:
    name: str
    help: str = ""
    numeric: bool = True


SYSTEM = Column("system", numeric=False)


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


def row_of(*cells: Cell | str | int) -> tuple[Cell, ...]:
    """Make a row; texts and counts become cells."""
    return tuple(cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in cells)


# --- numbers ----------------------------------------------------------------------------------------------


def number_text(value: float | None, digits: int, unit: str = "") -> str:
    """Format the value in decimals, times 100 if its unit is %, without a sign before zero; a dash for None."""
    if value is None:
        return NOTHING
    text = f"{value * (100 if unit == '%' else 1):.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def interval_text(estimate: Estimate | None, digits: int, unit: str = "") -> str:
    """Format value [low, high], or the value alone where there is no interval."""
    if estimate is None:
        return NOTHING
    value, low, high = (
        number_text(number, digits, unit) for number in (estimate.value, estimate.low, estimate.high)
    )
    return value if NOTHING in (value, low, high) else f"{value} [{low}, {high}]"


def estimate_text(estimate: Estimate | None, measure: MeasureRow) -> str:
    """Format a value with its interval, in the digits and the unit of its measure."""
    return interval_text(estimate, measure.digits, measure.unit)


def p_text(p: float | None) -> str:
    """Format a p-value to three decimals."""
    if p is None:
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def measure_title(measure: MeasureRow) -> str:
    """Return the name of the measure with its unit."""
    return f"{measure.name} ({measure.unit})" if measure.unit else measure.name


# --- tests ------------------------------------------------------------------------------------------------


def resolved(test: DifferenceRow) -> bool:
    """Return whether the interval excludes 0 and the p-value is below 0.05 after Holm's correction."""
    if None in (test.difference, test.low, test.high, test.p_holm):
        return False
    return not test.low <= 0 <= test.high and test.p_holm < SIGNIFICANT


def better_system(test: DifferenceRow, measure: MeasureRow) -> tuple[str, str] | None:
    """Return the better system of a resolved test and the other one, or None where neither is better."""
    if measure.better is None or not resolved(test):
        return None
    pair = (test.system_1, test.system_2)
    return pair if (test.difference > 0) == (measure.better == "high") else pair[::-1]


def reading(test: DifferenceRow, measure: MeasureRow) -> str:
    """Describe a test."""
    if None in (test.difference, test.low, test.high):
        return f"no test: {test.reason}"
    if test.low <= 0 <= test.high or (test.p_value or 0) >= SIGNIFICANT:
        if test.detectable is None:
            return "not resolved at this n"
        detectable = number_text(test.detectable, measure.digits, measure.unit)
        return f"not resolved at this n, which can show {detectable} or more"
    if not resolved(test):
        return "not resolved once every test is counted (Holm)"
    better = better_system(test, measure)
    if better is not None:
        return f"{better[0]} is better"
    return f"{test.system_1} is {'higher' if test.difference > 0 else 'lower'}"


def differences_table(comparison: Comparison) -> Table | None:
    """List every paired test, with the difference in the measure's unit."""
    if not comparison.tests:
        return None
    measures = {measure.key: measure for measure in comparison.measures}
    over = "What was drawn at random: a test over prompts is about these runs and no others."
    columns = (
        Column("systems", numeric=False),
        Column("measure", numeric=False),
        Column("difference", "The first system minus the second, on the same prompts."),
        Column("p", "How often chance alone would show such a difference, if there were none."),
        Column("p (Holm)", "The same, corrected for the number of tests."),
        Column("prompts"),
        Column("over", over, numeric=False),
        Column("reading", numeric=False),
    )
    rows = []
    for test in comparison.tests:
        measure = measures[test.measure]
        rows.append(
            row_of(
                f"{test.system_1} minus {test.system_2}",
                measure_title(measure),
                estimate_text(Estimate(test.difference, test.low, test.high), measure),
                p_text(test.p_value),
                p_text(test.p_holm),
                test.num_prompts,
                test.over or NOTHING,
                Cell(reading(test, measure), strong=resolved(test)),
            )
        )
    notes = (
        "Not resolved: the interval holds 0, or p is not below 0.05, so this many prompts cannot tell who is ahead. "
        "It does not mean that they are equal.",
    )
    return Table("Differences between systems", columns, tuple(rows), notes)


# --- systems ----------------------------------------------------------------------------------------------


def results_table(comparison: Comparison) -> Table | None:
    """Make one row per system, one column per measure: value, interval, each run's value, beaten systems."""
    if not comparison.systems:
        return None
    measures = comparison.measures
    columns = (SYSTEM, *(Column(measure_title(measure), measure.help) for measure in measures))
    rows = []
    for system in comparison.systems:
        cells = [Cell(system.name, _system_notes(system), system.warnings)]
        for measure in measures:
            estimate = system.values[measure.key]
            beaten = _beaten_by(system.name, measure, comparison.tests)
            notes = _runs_note(estimate, measure) + beaten
            cells.append(Cell(estimate_text(estimate, measure), notes, strong=bool(beaten)))
        rows.append(tuple(cells))
    notes = ["Brackets hold the 95% interval."]
    if any(cell.strong for row in rows for cell in row):
        notes.append("Better than: a paired test on the same prompts, p < 0.05 after Holm's correction.")
    return Table("Results", columns, tuple(rows), tuple(notes))


def _system_notes(system: SystemRow) -> tuple[str, ...]:
    notes = [] if system.method == system.name else [system.method]
    if system.setting is not None:
        notes.append(f"setting {system.setting:g}")
    if system.num_runs > 1:
        notes.append(f"{system.num_runs} runs")
    return (", ".join(notes),) if notes else ()


def _runs_note(estimate: RunsEstimate | None, measure: MeasureRow) -> tuple[str, ...]:
    if estimate is None or len(estimate.runs) < 2:
        return ()
    return ("runs " + ", ".join(number_text(run, measure.digits, measure.unit) for run in estimate.runs),)


def _beaten_by(name: str, measure: MeasureRow, tests: Sequence[DifferenceRow]) -> tuple[str, ...]:
    pairs = [better_system(test, measure) for test in tests if test.measure == measure.key]
    beaten = [pair[1] for pair in pairs if pair is not None and pair[0] == name]
    if not beaten:
        return ()
    return (f"better than {', '.join(beaten) if len(beaten) <= NAMED_AT_MOST else f'{len(beaten)} systems'}",)


def judge_table(comparison: Comparison) -> Table | None:
    """Describe the verdicts on each system: counts, failures, bounds, consistency, the share of the first slot."""
    judged = [system for system in comparison.systems if system.judged is not None]
    if not judged:
        return None
    columns = (
        SYSTEM,
        Column("wins"),
        Column("ties"),
        Column("losses"),
        Column("undecided", "Comparisons without a score. They count neither way."),
        Column("failed verdicts", "Answers of the judge that held no verdict, by what went wrong."),
        Column("all undecided lost (%)", "The win rate if every undecided comparison were lost."),
        Column("all undecided won (%)", "The win rate if every undecided comparison were won."),
        Column("consistent (%)", "How often both orders of the two responses gave the same verdict."),
        Column("first slot (%)", "How often the response shown first won. p: whether that differs from 50%."),
    )
    rows = []
    for system in judged:
        row = system.judged
        failures = [f"{row.statuses[name]} {name}" for name in STATUSES[1:] if row.statuses.get(name)]
        consistent = Estimate(row.consistent, row.consistent_low, row.consistent_high)
        first_p = row.first_slot_p
        p_note = () if first_p is None else (f"p {'' if first_p < 0.001 else '= '}{p_text(first_p)}",)
        rows.append(
            row_of(
                system.name,
                *(row.wins, row.ties, row.losses, row.undecided),
                ", ".join(failures) or "0",
                number_text(row.worst_case, 1, "%"),
                number_text(row.best_case, 1, "%"),
                interval_text(consistent, 1, "%"),
                Cell(number_text(row.first_slot_wins, 1, "%"), p_note),
            )
        )
    return Table(f"Judged against {comparison.baseline}", columns, tuple(rows))


def matches_table(comparison: Comparison) -> Table | None:
    """List the systems that were judged directly against each other, not through the baseline."""
    if not comparison.matches:
        return None
    columns = (
        Column("systems", numeric=False),
        Column(
            "win rate of the first (%)", "Over prompts; several runs are pooled, and their seeds left out."
        ),
        *(Column(name) for name in ("wins", "ties", "losses", "undecided", "prompts")),
    )
    rows = [
        row_of(
            f"{match.system_1} against {match.system_2}",
            interval_text(match, 1, "%"),
            *(match.wins, match.ties, match.losses, match.undecided, match.num_prompts),
        )
        for match in comparison.matches
    ]
    return Table("Judged against each other", columns, tuple(rows))


def ranking_table(comparison: Comparison) -> Table | None:
    """Put all systems on one scale, with the interval."""
    ranking = comparison.ranking
    if ranking is None or not (ranking.systems or ranking.warnings):
        return None
    columns = (
        SYSTEM,
        Column("Elo", "400 points are odds of ten to one (Bradley-Terry, a tie is half a win)."),
    )
    rows = [
        row_of(system.name, interval_text(Estimate(system.elo, system.low, system.high), 0))
        for system in ranking.systems
    ]
    zero = "the mean of all systems" if ranking.anchor is None else ranking.anchor
    source = "with the baseline and of systems with each other" if comparison.matches else "with the baseline"
    origin = f"From {ranking.num_comparisons} comparisons {source}, relative to {zero}."
    return Table("Ranking", columns, tuple(rows), (origin, *ranking.warnings))
