"""The report of a comparison: one self-contained HTML file, and the same tables as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from eval.reporting.comparison import Comparison, JudgeRow, read_comparison
from eval.reporting.html import html_page, script_json, write_pages
from eval.reporting.report_markdown import markdown_page
from eval.reporting.report_plots import Figure, figures
from eval.reporting.report_tables import (
    Table,
    differences_table,
    judge_table,
    matches_table,
    ranking_table,
    results_table,
)


def report(path: Path) -> Path:
    """Rewrite the pages of a comparison in its folder, from comparison.json, without measuring or judging again.

    `path` is that file or its folder. Returns the path of report.html. Raises DataError as `read_comparison` does.
    """
    path = Path(path)
    return write_report(read_comparison(path), path if path.is_dir() else path.parent)


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write report.html and report.md into `folder`, and return the path of report.html."""
    facts, plots = headline(comparison), figures(comparison)
    tables = {
        "results": results_table(comparison),
        "judge": judge_table(comparison),
        "tests": differences_table(comparison),
        "matches": matches_table(comparison),
        "ranking": ranking_table(comparison),
    }
    pages = {
        "report.md": markdown_page(comparison, facts, list(filter(None, tables.values())), plots),
        "report.html": _page(comparison, facts, tables, plots),
    }
    write_pages(pages, folder)
    return folder / "report.html"


def headline(comparison: Comparison) -> list[tuple[str, str]]:
    """Return name and text of the facts at the top: judge and its cost, baseline, prompts, date, commit."""
    sizes = sorted({system.num_prompts for system in comparison.systems})
    judge = comparison.judge
    written = re.sub(r"^(\S{10})T(\d\d:\d\d)\S*?(Z|\+00:00)$", r"\1 \2 UTC", comparison.created)
    facts = {
        "task": comparison.task,
        "baseline": comparison.baseline,
        "prompts": f"{sizes[0]} to {sizes[-1]}, by system" if sizes[1:] else "".join(map(str, sizes)),
        "judge": "none" if judge is None else judge_text(judge),
        "spent on the judge": "" if judge is None else spent_text(judge.spent or {}),
        "written": written,
        "commit": re.sub(r"^([0-9a-f]{12})[0-9a-f]{28}", r"\1", comparison.commit or "unknown"),
    }
    return [(name, text) for name, text in facts.items() if text]


def judge_text(judge: JudgeRow) -> str:
    """Describe the judge."""
    parts = [judge.name, judge.kind.replace("_", " ")]
    if judge.prompt is not None:
        parts.append(f"prompt {judge.prompt}")
    parts.append("both orders" if judge.orders == "both" else "one order")
    parts.append("ties allowed" if judge.ties else "no ties")
    return ", ".join(dict.fromkeys(parts))


def spent_text(spent: Mapping[str, float | None]) -> str:
    """Format calls, tokens and dollars as one text."""
    parts = []
    for key, number in spent.items():
        if key == "cost":
            parts.append("cost unknown" if number is None else f"${number:,.2f}")
        elif number is not None:
            parts.append(f"{number:,.0f} {key.replace('_', ' ')}")
    return ", ".join(parts)


def _page(
    comparison: Comparison,
    facts: list[tuple[str, str]],
    tables: Mapping[str, Table | None],
    plots: list[Figure],
) -> str:
    browser_data = {
        "measures": comparison.measures,
        "systems": [{"name": system.name, "method": system.method} for system in comparison.systems],
        "examples": comparison.examples,
    }
    values = {
        "title": comparison.title,
        "comparison": comparison,
        "facts": facts,
        "tables": tables,
        "plots": plots,
        "data": Markup(script_json(browser_data)),
    }
    return html_page("page.html.j2", values, script="page.js")
