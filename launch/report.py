"""Rebuild the report pages of a comparison from its comparison.json alone.

    python launch/report.py <comparison.json, or the folder that holds it>

Writes report.html and report.md next to it and prints the path of the page. No response is measured or judged again.
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
from eval.reporting.report import report


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, write the pages, print the path of report.html as the last line."""
    parser = argparse.ArgumentParser(description="Write the pages of a comparison anew.")
    parser.add_argument("comparison", type=Path, help="comparison.json, or the folder that holds it")
    path = parser.parse_args(arguments).comparison
    try:
        page = report(path)
    except (DataError, OSError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    print(page.resolve())


if __name__ == "__main__":
    main()
