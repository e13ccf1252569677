"""The pages of an online training run, from the files of its folder."""

from __future__ import annotations

from pathlib import Path

from eval.reporting.html import embedded_png, html_page, write_pages
from eval.training_runs.files import METRICS, read_run
from eval.training_runs.page import markdown_page, page_of


def report(path: Path) -> Path:
    """Write training.html and training.md into the folder of a run, finished or still going.

    `path` is the folder or its metrics.jsonl. Returns the path of training.html. Raises DataError as `read_run` does.
    """
    path = Path(path)
    folder = path.parent if path.name == METRICS else path
    run = read_run(folder)
    page = page_of(run)
    images = {plot.title: embedded_png(plot.png) for part in page.parts for plot in part.plots}
    values = {**vars(page), "images": images, "versions": run.versions}
    pages = {"training.md": markdown_page(page), "training.html": html_page("training.html.j2", values)}
    write_pages(pages, folder)
    return folder / "training.html"
