"""Human verdicts that come with data, as completions and labels: TL;DR comparisons, HH, or pairs of one's own.

    python launch/import_labels.py [recipe.yaml] [key=value ...]

Leaves completions.jsonl (systems text_1 and text_2, for launch/judge.py) and labels.jsonl (for launch/agreement.py) in
`run_dir`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from drpo.config import save_resolved
from drpo.data.demo import make_demo
from drpo.data.load import DataConfig, read_records
from drpo.data.records import BadRows, DataError
from drpo.data.views import view_records
from eval.completions import CompletionsWriter
from eval.labelling.import_labels import labels_from_pairs
from eval.labelling.labels import LabelsWriter
from launch.command_line import main

APPLIES = ("task", "path", "subset", "limit", "columns", "max_bad_fraction", "demo")


@dataclass(frozen=True)
class ImportLabelsRecipe:
    """Pairs of which people chose one response."""

    run_dir: str = "runs/import_labels"
    """Folder of the results."""
    split: str = "train"
    """The split of the data; a single file is the split train, and the demo has train and eval."""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        for option in fields(DataConfig):
            if option.name in APPLIES:
                continue
            default = option.default_factory() if callable(option.default_factory) else option.default
            if getattr(self.data, option.name) != default:
                raise ValueError(f"data.{option.name} does not apply to labels: they are of whole texts")
        if self.data.task == "demo" and self.split not in ("train", "eval"):
            raise ValueError(f"split must be train or eval for data.task=demo, got {self.split}")


def run(recipe: ImportLabelsRecipe) -> Path:
    """Read the pairs, write what people said of them; the path of the labels."""
    folder, config = Path(recipe.run_dir), recipe.data
    path = folder / "labels.jsonl"
    for name in ("completions.jsonl", "labels.jsonl"):
        if (folder / name).exists():
            raise DataError(f"{folder / name} is there already; choose another run_dir or remove it")
    report: list[str] = []
    bad = BadRows()
    if config.task == "demo":
        records = make_demo(config.demo, "pairs", recipe.split)[: config.limit]
    else:
        records = read_records(config, recipe.split, None, report)
    records, notes = view_records(records, "pairs", bad)
    rows, labels, counts = labels_from_pairs(records, bad)
    bad.check(len(records), config.max_bad_fraction)
    if bad:
        report.append(f"{len(bad)} pairs left out:\n{bad.summary()}")
    print("\n".join([*report, *notes, *counts]), flush=True)
    if not labels:
        raise DataError("no labelled pairs are left")
    folder.mkdir(parents=True, exist_ok=True)
    save_resolved(recipe, folder / "config.yaml")
    CompletionsWriter(folder / "completions.jsonl", {"data": config.path or config.task}).write(rows)
    with LabelsWriter(path) as writer:
        writer.append(labels)
    return path


if __name__ == "__main__":
    main(ImportLabelsRecipe, "demo/import_labels.yaml", run)
