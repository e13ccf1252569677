"""The report as GitHub Markdown: the tables of the page, with every text escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence

from eval.reporting.comparison import Comparison
from eval.reporting.report_plots import Figure
from eval.reporting.report_tables import Cell, Table

_SPECIAL = re.compile(r"[\\`*\[\]<>|~&#$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def escaped(text: str) -> str:
    """Escape the text, on one line, so that it contains no markup and its `|` ends no cell.

    An underscore within a word is not markup and is unchanged.
    """
    return _SPECIAL.sub(lambda found: "\\" + found[0], " ".join(text.split()))


def markdown_table(table: Table) -> str:
    """Write a Markdown table; notes and warnings of a cell are separate lines in it."""
    lines = ["| " + " | ".join(escaped(column.name) for column in table.columns) + " |"]
    lines.append("|" + "|".join(" ---: " if column.numeric else " --- " for column in table.columns) + "|")
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows]
    if table.notes:
        lines += ["", " ".join(escaped(note) for note in table.notes)]
    return "\n".join(lines)


def markdown_list(pairs: Sequence[tuple[str, str]]) -> str:
    """Write names in bold, each with its text."""
    return "\n".join(f"- **{escaped(name)}**: {escaped(text)}" for name, text in pairs)


def _cell(cell: Cell) -> str:
    text = f"**{escaped(cell.text)}**" if cell.strong else escaped(cell.text)
    warnings = [f"**Warning:** {escaped(warning)}" for warning in cell.warnings]
    return "<br>".join([text, *map(escaped, cell.notes), *warnings])


def markdown_page(
    comparison: Comparison,
    facts: Sequence[tuple[str, str]],
    tables: Sequence[Table],
    plots: Sequence[Figure],
) -> str:
    """Write the page: facts, tables, meaning of the measures, numbers of the plots, hashes, versions."""
    parts = [f"# {escaped(comparison.title)}", markdown_list(facts)]
    parts += [f"## {escaped(table.title)}\n\n{markdown_table(table)}" for table in tables]
    if comparison.measures:
        meanings = [(measure.name, measure.help) for measure in comparison.measures]
        parts.append(f"## What the numbers are\n\n{markdown_list(meanings)}")
    parts += [f"## {escaped(plot.title)}\n\n{markdown_table(plot.table)}" for plot in plots]
    for name, hashes in comparison.hashes.items():
        parts.append(f"## Hashes of {escaped(name)}\n\n{markdown_list(list(hashes.items()))}")
    if comparison.versions:
        parts.append(f"## Versions\n\n{markdown_list(list(comparison.versions.items()))}")
    return "\n\n".join(parts) + "\n"
