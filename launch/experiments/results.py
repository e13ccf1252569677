"""Results of an experiment: metrics of its runs, a Markdown table, a curve over seeds, and the numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from drpo.run.metrics import read_metrics


def metric(run_dir: Path, key: str) -> list[float]:
    """Read the values of a metric of a run, step by step; empty where it is not measured."""
    return [row[key] for row in read_metrics(run_dir / "metrics.jsonl") if key in row]


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Format a Markdown table of rows from column to cell; the columns are those of the first row."""
    lines = (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows))
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def plot_seeds(axis: Axes, x: Sequence[Sequence[float]], y: Sequence[Sequence[float]], label: str) -> None:
    """Plot runs of several seeds as one line, y over x: at each point the means, and the range of y."""
    values = np.array(y)
    points = np.mean(x, axis=0)
    (line,) = axis.plot(points, values.mean(axis=0), marker=".", label=label)
    axis.fill_between(points, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.12)


def median_and_range(values: Sequence[float]) -> str:
    """Format ratios as `median (smallest to largest)`."""
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def write_results(root: Path, results: Any, text: str, show: bool = True) -> Path:
    """Write results.json and results.md, print the text if `show`, and return the path of results.md."""
    (root / "results.json").write_text(json.dumps(results, indent=1))
    (root / "results.md").write_text(text)
    if show:
        print(text)
    return root / "results.md"
