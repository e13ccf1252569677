"""The pages of an evaluation, from its evaluation.json and the plots beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drpo.data.records import DataError
from eval.reporting.html import embedded_png, html_page, write_pages
from eval.reporting.results_file import read_results
from eval.reward_models.page import MEANINGS, facts, markdown_page, tables, title
from eval.reward_models.plots import plots_of

FILE = "evaluation.json"
"Name of the results in the folder of an evaluation."
COMMAND = "launch/evaluate_reward_model.py"


def report(path: Path) -> Path:
    """Rewrite the pages of an evaluation in its folder, without scoring anything again.

    `path` is evaluation.json or its folder. Returns the path of evaluation.html. Raises DataError for a file that is
    missing or no evaluation.
    """
    file = path / FILE if path.is_dir() else path
    evaluation = read_results(file, "evaluation", COMMAND)
    try:
        return write_report(evaluation, file.parent)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is no evaluation of this version ({type(error).__name__}: {error}); {COMMAND} writes it anew"
        ) from None


def write_report(evaluation: Mapping[str, Any], folder: Path) -> Path:
    """Write evaluation.html and evaluation.md beside the plots in `folder`; return the path of evaluation.html.

    Raises DataError for a plot that is missing.
    """
    plots = plots_of(evaluation)
    values = {
        "title": title(evaluation),
        "facts": facts(evaluation),
        "tables": list(tables(evaluation)),
        "images": {name: embedded_png(_read_plot(folder / file)) for name, file in plots.items()},
        "meanings": MEANINGS,
        "versions": evaluation["created_by"]["versions"],
    }
    pages = {
        "evaluation.md": markdown_page(evaluation, plots),
        "evaluation.html": html_page("evaluation.html.j2", values),
    }
    write_pages(pages, folder)
    return folder / "evaluation.html"


def _read_plot(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"no plot at {path}: {error.strerror}; {COMMAND} draws it") from None
