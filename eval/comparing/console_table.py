"""The table of a comparison on the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table


def comparison_table(result: Mapping[str, Any]) -> Table:
    """Systems x measures, for the console."""
    shown = [
        measure
        for measure in result["measures"]
        if any(system["values"][measure["key"]] for system in result["systems"])
    ]
    table = Table(title=escape(result["title"]))
    table.add_column("")
    for measure in shown:
        table.add_column(escape(f"{measure['name']} {measure['unit']}".strip()), justify="right")
    for system in result["systems"]:
        cells = [_cell(system["values"][measure["key"]], measure) for measure in shown]
        runs = f" ({system['num_runs']} seeds)" if system["num_runs"] > 1 else ""
        table.add_row(escape(system["name"]) + runs, *cells)
    return table


def _cell(value: Mapping[str, Any] | None, measure: Mapping[str, Any]) -> str:
    if value is None:
        return ""
    scale, digits = (100 if measure["unit"] == "%" else 1), measure["digits"]
    numbers = [
        None if value[key] is None else f"{value[key] * scale:.{digits}f}" for key in ("value", "low", "high")
    ]
    return numbers[0] if numbers[1] is None else f"{numbers[0]}\n\\[{numbers[1]}, {numbers[2]}]"
