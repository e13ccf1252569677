"""Tables of the agreement of judges and people on the console."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

MAX_ROWS = 24


def show_agreement(found: dict[str, Any]) -> None:
    """Print the contents of agreement.json, at most MAX_ROWS rows per table."""
    console = Console(markup=False, highlight=False, emoji=False)
    together = [
        (f"{x.rater_1}, {x.rater_2}", x.agreement.n, _percent(x.agreement, "agreement"), _kappa(x.agreement))
        for x in found["agreement"]
    ]
    people = found["people_together"]
    if people is not None:
        together.append(("any two people", people.num_pairs, _percent(people.agreement), _kappa(people)))
    _table(console, "agreement", ("", "comparisons", "agreement", "kappa"), together)
    rows = [
        (
            x.judge,
            x.ceiling.num_pairs,
            *map(_percent, (x.ceiling.judge, x.ceiling.humans, x.ceiling.difference)),
        )
        for x in found["ceilings"]
    ]
    heads = ("judge", "comparisons", "judge and a person", "two people", "difference")
    _table(console, "comparisons with several labels", heads, rows)
    rows = [
        (
            x.name,
            x.num_verdicts,
            f"{x.ties:.0%}",
            "unknown" if x.position is None else _percent(x.position, "first_share"),
            "no difference" if x.longer_wins is None else _percent(x.longer_wins, "rate"),
        )
        for x in found["habits"]
    ]
    _table(console, "habits", ("", "verdicts", "ties", "first slot wins", "longer one wins"), rows)
    rows = [
        (
            f"{x.system_a} against {x.system_b}, {x.judge}",
            *(_percent(rate, "rate") for rate in (x.by_judge, x.by_people)),
            _percent(x.difference, "difference"),
        )
        for x in found["win_rates"]
    ]
    heads = ("", "by the judge", "by people", "difference")
    _table(console, "win rates on the comparisons that both decided", heads, rows)
    rows = [
        (x.judge, f"{x.confidence:g}", x.agreement.n, _percent(x.agreement, "agreement"))
        for x in found["by_confidence"]
    ]
    heads = ("judge", "confidence", "labels", "agreement")
    _table(console, "by the annotators' confidence", heads, rows)
    counts = {**found["counts"], **{f"left out: {name}": n for name, n in found["left_out"].items()}}
    for line in [*(f"{name}: {count}" for name, count in counts.items()), *found["notes"]]:
        console.print(line)


def _table(console: Console, title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    if not rows:
        return
    table = Table(title=f"{title} [95% intervals over prompts]", title_justify="left")
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place else "left", no_wrap=place > 0, overflow="fold")
    for row in rows[:MAX_ROWS]:
        table.add_row(*map(str, row))
    console.print(table)
    if len(rows) > MAX_ROWS:
        console.print(f"and {len(rows) - MAX_ROWS} more rows in agreement.json")


def _percent(measured: Any, name: str = "value") -> str:
    value, low, high = (100 * getattr(measured, part) for part in (name, "low", "high"))
    return f"{value:.1f}% [{low:.1f}, {high:.1f}]"


def _kappa(measured: Any) -> str:
    if np.isnan(measured.kappa):
        return "-"
    return f"{measured.kappa:.2f} [{measured.kappa_low:.2f}, {measured.kappa_high:.2f}]"
