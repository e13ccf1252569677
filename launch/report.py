"""Rebuild the pages of a comparison, or of an evaluation of reward models, from its JSON file.

    python launch/report.py <comparison.json, evaluation.json, or the folder that holds one>

Writes report.html and report.md, or evaluation.html and evaluation.md, next to it and prints the path of the HTML page.
No response is measured, judged or scored again; the plots of an evaluation are those in its folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from drpo.data.records import DataError
from eval.reporting import report as comparisons
from eval.reward_models import report as evaluations


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, write the pages, print the path of the HTML page as the last line."""
    parser = argparse.ArgumentParser(description="Write the pages of a comparison or an evaluation anew.")
    parser.add_argument(
        "path", type=Path, help="comparison.json, evaluation.json, or the folder that holds one"
    )
    try:
        page = report(parser.parse_args(arguments).path)
    except (DataError, OSError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    print(page.resolve())


def report(path: Path) -> Path:
    """Write the pages of what lies at `path`. Raises DataError for a folder that holds both kinds of results."""
    if not path.is_dir():
        return evaluations.report(path) if path.name == evaluations.FILE else comparisons.report(path)
    if not (path / evaluations.FILE).exists():
        return comparisons.report(path)
    if (path / "comparison.json").exists():
        raise DataError(f"{path} holds comparison.json and {evaluations.FILE}: name one of them")
    return evaluations.report(path)


if __name__ == "__main__":
    main()
