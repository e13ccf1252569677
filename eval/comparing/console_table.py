"""The table of a comparison on the console."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from eval.reporting.comparison import Comparison, Estimate, MeasureRow


def comparison_table(comparison: Comparison) -> Table:
    """Make the table of systems x measures."""
    shown = [
        measure
        for measure in comparison.measures
        if any(system.values[measure.key] for system in comparison.systems)
    ]
    table = Table(title=escape(comparison.title))
    table.add_column("")
    for measure in shown:
        table.add_column(escape(f"{measure.name} {measure.unit}".strip()), justify="right")
    for system in comparison.systems:
        cells = [_cell(system.values[measure.key], measure) for measure in shown]
        runs = f" ({system.num_runs} seeds)" if system.num_runs > 1 else ""
        table.add_row(escape(system.name) + runs, *cells)
    return table


def _cell(estimate: Estimate | None, measure: MeasureRow) -> str:
    if estimate is None:
        return ""
    scale = 100 if measure.unit == "%" else 1
    numbers = (estimate.value, estimate.low, estimate.high)
    texts = [None if number is None else f"{number * scale:.{measure.digits}f}" for number in numbers]
    return texts[0] if texts[1] is None else f"{texts[0]}\n\\[{texts[1]}, {texts[2]}]"
