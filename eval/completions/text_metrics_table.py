"""Text metrics as JSON and as a table for the console."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from eval.completions.text_metrics import TextMetrics
from eval.statistics.intervals import Interval


def save_text_metrics(measured: Sequence[TextMetrics], path: Path) -> None:
    """Write a JSON list with one object per system; missing limits are null."""
    text = json.dumps([asdict(metrics) for metrics in measured])
    values = json.loads(text, parse_constant=lambda _: None)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def text_metrics_table(measured: Sequence[TextMetrics]) -> Table:
    """Make the table of metrics x systems, without metrics that no system has."""
    table = Table(title="text metrics; [95% intervals] over prompts")
    table.add_column("")
    for metrics in measured:
        table.add_column(escape(metrics.system), justify="right")
    for name in (field.name for field in fields(TextMetrics)):
        cells = [getattr(metrics, name) for metrics in measured]
        if name != "system" and any(cell is not None for cell in cells):
            table.add_row(name, *map(cell_text, cells))
    return table


def cell_text(value: Interval | float | int | None) -> str:
    """Format as `0.512 [0.48, 0.55]`, without limits where there are none; empty for None."""
    if value is None:
        return ""
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    text = f"{value.value:.3g}"
    # rich takes [ for markup unless it is escaped.
    return text if math.isnan(value.low) else f"{text} \\[{value.low:.3g}, {value.high:.3g}]"
