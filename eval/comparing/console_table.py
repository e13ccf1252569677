"""The table of a comparison on the console."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from eval.reporting.comparison import Comparison, Estimate, MeasureRow
from eval.reporting.report_tables import estimate_text


def comparison_table(comparison: Comparison) -> Table:
    """Make the table of systems x measures."""
    measures = [
        measure
        for measure in comparison.measures
        if any(system.values[measure.key] for system in comparison.systems)
    ]
    table = Table(title=escape(comparison.title))
    table.add_column("")
    for measure in measures:
        table.add_column(escape(f"{measure.name} {measure.unit}".strip()), justify="right")
    for system in comparison.systems:
        cells = [_cell(system.values[measure.key], measure) for measure in measures]
        runs = f" ({system.num_runs} seeds)" if system.num_runs > 1 else ""
        table.add_row(escape(system.name) + runs, *cells)
    return table


def _cell(estimate: Estimate | None, measure: MeasureRow) -> str:
    """Format the value, with its interval on a second line."""
    return "" if estimate is None else escape(estimate_text(estimate, measure).replace(" [", "\n["))
