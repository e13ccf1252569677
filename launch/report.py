"""Write the pages of a comparison, of an evaluation of reward models, or of an online training run, from its files.

    python launch/report.py <comparison.json, evaluation.json, metrics.jsonl, or the folder that holds one>

Writes report.html and report.md, evaluation.html and evaluation.md, or training.html and training.md, next to it and
prints the path of the HTML page. No response is measured, judged or scored again; the plots of an evaluation are those
in its folder. A training run may still be going.
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
from eval.training_runs import report as training_runs
from eval.training_runs.files import METRICS


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, write the pages, print the path of the HTML page as the last line."""
    parser = argparse.ArgumentParser(
        description="Write the pages of a comparison (report.html, report.md), of an evaluation of reward models "
        "(evaluation.*) or of an online training run (training.*) anew, next to its files."
    )
    parser.add_argument(
        "path",
        type=Path,
        help="comparison.json, evaluation.json, metrics.jsonl, or the folder that holds one",
    )
    try:
        page = report(parser.parse_args(arguments).path)
    except (DataError, OSError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    print(page.resolve())


def report(path: Path) -> Path:
    """Write the pages of what lies at `path`. Raises DataError for a folder that holds several kinds of results."""
    writers = {
        "comparison.json": comparisons.report,
        evaluations.FILE: evaluations.report,
        METRICS: training_runs.report,
    }
    names = ", ".join(writers)
    give = "give the folder of a comparison, an evaluation or a run"
    if not path.is_dir():
        if path.name not in writers and (not path.exists() or path.suffix != ".json"):
            what = "is none of the files" if path.exists() else "does not exist"
            raise DataError(f"{path} {what}: {give}, or its {names}")
        return writers.get(path.name, comparisons.report)(path)
    found = [name for name in writers if (path / name).exists()]
    if len(found) > 1:
        raise DataError(f"{path} holds {' and '.join(found)}: name one of them")
    if not found:
        raise DataError(f"{path} holds none of {names}: {give}")
    return writers[found[0]](path)


if __name__ == "__main__":
    main()
