"""How far a judge agrees with people, and people with each other.

    python launch/agreement.py [recipe.yaml] [key=value ...]

Reads judgments.jsonl of launch/judge.py and labels.jsonl of launch/label.py or launch/import_labels.py; leaves
agreement.json in `run_dir` and prints it as tables. Several judgments files: judges against each other, too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

import numpy as np
from rich.console import Console
from rich.table import Table

from drpo.config import ConfigError, save_resolved
from drpo.data.records import DataError
from eval.labelling.label_agreement import (
    by_confidence,
    ceilings,
    everybody_together,
    everybodys_habits,
    people_together,
    win_rates,
)
from eval.labelling.labels import load_labels
from eval.labelling.ratings import Ratings, read_judge_file, side_by_side
from launch.command_line import main

MAX_ROWS = 24


@dataclass(frozen=True)
class AgreementRecipe:
    """Judges and people on the same comparisons."""

    run_dir: str = "runs/agreement"
    """Folder of the results."""
    judgments: list[str] = field(default_factory=list)
    """Files judgments.jsonl, one a judge."""
    labels: list[str] = field(default_factory=list)
    """Files labels.jsonl, each with any number of annotators."""
    half_tie: Literal["half", "tie"] = "half"
    """What a judge's win in one order and tie in the other count: 0.75, a win here, or 0.5 (tie), a tie."""

    def __post_init__(self) -> None:
        for path in self.judgments:
            if self.judgments.count(path) > 1:
                raise ValueError(
                    f"judgments names {path} twice, and a judge agrees with itself; give each file once"
                )


def run(recipe: AgreementRecipe) -> Path:
    """Lay all files side by side, measure, write and print."""
    if len(recipe.judgments) + len(recipe.labels) == 0:
        raise ConfigError("judgments and labels must name files: at least one of labels, or two of judgments")
    judges = [read_judge_file(path, recipe.half_tie) for path in recipe.judgments]
    labels = load_labels(recipe.labels)
    ratings = side_by_side(judges, labels)
    if len(ratings.judges) + len(ratings.people) < 2:
        raise DataError("there is one rater only, and nobody to agree with; give more judgments or labels")
    notes = _notes(ratings, {judge.question for judge in judges}, {label.question for label in labels})
    found = {
        "judgments": recipe.judgments,
        "labels": recipe.labels,
        "counts": _counts(ratings),
        "left_out": dict(ratings.left_out),
        "notes": notes,
        "agreement": everybody_together(ratings),
        "people_together": people_together(ratings),
        "ceilings": ceilings(ratings),
        "habits": everybodys_habits(ratings),
        "win_rates": win_rates(ratings),
        "by_confidence": by_confidence(ratings),
    }
    if not found["agreement"]:
        raise DataError(
            "no two raters decided one comparison in common; the files are of other prompts, systems or texts: "
            + _sentence(ratings)
        )
    folder = Path(recipe.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_resolved(recipe, folder / "config.yaml")
    path = folder / "agreement.json"
    values = json.loads(json.dumps(found, default=asdict), parse_constant=lambda _: None)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    _print(found)
    return path


def _counts(ratings: Ratings) -> dict[str, int]:
    """How many comparisons there are of each kind."""
    nobody = np.zeros((len(ratings.keys), 1), dtype=bool)
    judged, labelled = (
        np.concatenate([nobody, *(~np.isnan(rater.scores[:, None]) for rater in raters)], axis=1)
        for raters in (ratings.judges, ratings.people)
    )
    return {
        "comparisons": len(ratings.keys),
        "judged": int(judged.any(axis=1).sum()),
        "labelled": int(labelled.any(axis=1).sum()),
        "judged and labelled": int((judged.any(axis=1) & labelled.any(axis=1)).sum()),
        "labelled by several": int((labelled.sum(axis=1) > 1).sum()),
    }


def _notes(ratings: Ratings, asked: set[str | None], answered: set[str | None]) -> list[str]:
    questions = sorted((asked | answered) - {None})
    notes = []
    if len(questions) > 1:
        notes.append(f"not everybody was asked the same: {', '.join(questions)}")
    if len(ratings.people) > 1 and not _counts(ratings)["labelled by several"]:
        notes.append("no comparison has several labels, so there is no ceiling")
    return notes


def _sentence(ratings: Ratings) -> str:
    counts = {**_counts(ratings), **ratings.left_out}
    return ", ".join(f"{name}: {count}" for name, count in counts.items())


# --- tables ---------------------------------------------------------------------------------------------


def _print(found: dict[str, Any]) -> None:
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


if __name__ == "__main__":
    main(AgreementRecipe, "demo/agreement.yaml", run)
