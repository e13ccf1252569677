"""Show sample rows as a table on the console, forced prefixes in reverse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

PROMPT_TAIL = 160  # characters of a prompt that the table shows


def sample_table(rows: Sequence[dict[str, Any]], step: int) -> Table:
    """Make a console table of sample rows; the forced prefix is shown in reverse."""
    table = Table(title=f"samples at step {step} (forced prefix in reverse; | = stopped)", show_lines=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("response", ratio=3, overflow="fold")
    table.add_column("scores", justify="right")
    for row in rows:
        prompt = row["prompt"]
        shown = prompt if len(prompt) <= PROMPT_TAIL else "..." + prompt[-PROMPT_TAIL:]
        response = Text(row["prefix"], style="reverse") + Text(row["continuation"])
        response.append(" |" if row["ended"] else " ...")
        scores = "\n".join(f"{name} {value:.3f}" for name, value in row["scores"].items())
        table.add_row(Text(shown), response, scores)
    return table
