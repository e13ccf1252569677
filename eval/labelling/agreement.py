"""Compare judges with people, from their files, as JSON and tables: agreement, its ceiling, habits, win rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from drpo.config import ConfigError, Section, refuse, save_resolved
from drpo.data.records import DataError
from eval.labelling.label_agreement import compare_raters
from eval.labelling.labels import load_labels
from eval.labelling.ratings import Ratings, read_judge_file, side_by_side

MAX_ROWS = 24
"Rows of a table on the console."


@dataclass(frozen=True)
class AgreementRecipe(Section):
    """Judges and people on the same matchups."""

    run_dir: str = "runs/agreement"
    """Folder of the results."""
    judgments: list[str] = field(default_factory=list)
    """Files judgments.jsonl, one a judge."""
    labels: list[str] = field(default_factory=list)
    """Files labels.jsonl, each with any number of annotators."""
    half_tie: Literal["half", "tie"] = "half"
    """Score of a judge's win in one order and tie in the other: half is 0.75, which agrees with a win, tie is 0.5."""

    def check(self) -> None:
        for path in self.judgments:
            rule = f"names {path} twice, and a judge agrees with itself; give each file once"
            refuse(self.judgments.count(path) > 1, "judgments", rule)


def agreement(recipe: AgreementRecipe) -> Path:
    """Match the verdicts and labels of all files, compute, write and print. Returns the path of agreement.json."""
    if not recipe.judgments and not recipe.labels:
        raise ConfigError("judgments and labels must name files: at least one of labels, or two of judgments")
    judges = [read_judge_file(path, recipe.half_tie) for path in recipe.judgments]
    labels = load_labels(recipe.labels)
    ratings = side_by_side(judges, labels)
    if len(ratings.judges) + len(ratings.people) < 2:
        raise DataError("there is one rater only, and nobody to agree with; give more judgments or labels")
    counts = _counts(ratings)
    results = {
        "judgments": recipe.judgments,
        "labels": recipe.labels,
        "counts": counts,
        "left_out": dict(ratings.left_out),
        "notes": [],
        **compare_raters(ratings),
    }
    questions = {rating.question for rating in (*judges, *labels)} - {None}
    if len(questions) > 1:
        results["notes"].append(f"not everybody was asked the same: {', '.join(sorted(questions))}")
    if len(ratings.people) > 1 and not counts["labelled by several"]:
        results["notes"].append("no comparison has several labels, so there is no ceiling")
    if not results["agreement"]:
        raise DataError(
            "no two raters decided one comparison in common; the files are of other prompts, systems or texts: "
            + ", ".join(f"{name}: {count}" for name, count in {**counts, **ratings.left_out}.items())
        )
    folder = Path(recipe.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_resolved(recipe, folder / "config.yaml")
    path = folder / "agreement.json"
    values = json.loads(json.dumps(results, default=asdict), parse_constant=lambda _: None)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    _show(results)
    return path


def _counts(ratings: Ratings) -> dict[str, int]:
    """Count the matchups of each kind."""
    judged = np.any([~np.isnan(judge.scores) for judge in ratings.judges], axis=0)
    labelled = ratings.num_labels > 0
    kinds = {
        "judged": judged,
        "labelled": labelled,
        "judged and labelled": judged & labelled,
        "labelled by several": ratings.num_labels > 1,
    }
    return {"comparisons": len(ratings.keys)} | {name: int(mask.sum()) for name, mask in kinds.items()}


# --- tables ---------------------------------------------------------------------------------------------


def _show(results: dict[str, Any]) -> None:
    """Print the contents of agreement.json, at most MAX_ROWS rows per table."""
    console = Console(markup=False, highlight=False, emoji=False)
    rows = [
        (f"{x.rater_1}, {x.rater_2}", x.agreement.n, _percent(x.agreement, "agreement"), _kappa(x.agreement))
        for x in results["agreement"]
    ]
    people = results["people_together"]
    if people is not None:
        rows.append(("any two people", people.num_pairs, _percent(people.agreement), _kappa(people)))
    _table(console, "agreement", ("", "comparisons", "agreement", "kappa"), rows)
    rows = []
    for x in results["ceilings"]:
        shares = (x.ceiling.judge, x.ceiling.humans, x.ceiling.difference)
        rows.append((x.judge, x.ceiling.num_pairs, *map(_percent, shares)))
    heads = ("judge", "comparisons", "judge and a person", "two people", "difference")
    _table(console, "comparisons with several labels", heads, rows)
    rows = []
    for x in results["habits"]:
        position = "unknown" if x.position is None else _percent(x.position, "first_share")
        longer_wins = "no difference" if x.longer_wins is None else _percent(x.longer_wins, "rate")
        rows.append((x.name, x.num_verdicts, f"{x.ties:.0%}", position, longer_wins))
    _table(console, "habits", ("", "verdicts", "ties", "first slot wins", "longer one wins"), rows)
    rows = []
    for x in results["win_rates"]:
        rates = _percent(x.by_judge, "rate"), _percent(x.by_people, "rate")
        systems = f"{x.system_a} against {x.system_b}, {x.judge}"
        rows.append((systems, *rates, _percent(x.difference, "difference")))
    heads = ("", "by the judge", "by people", "difference")
    _table(console, "win rates on the comparisons that both decided", heads, rows)
    rows = [
        (x.judge, f"{x.confidence:g}", x.agreement.n, _percent(x.agreement, "agreement"))
        for x in results["by_confidence"]
    ]
    _table(console, "by the annotators' confidence", ("judge", "confidence", "labels", "agreement"), rows)
    counts = {**results["counts"], **{f"left out: {name}": n for name, n in results["left_out"].items()}}
    for line in [*(f"{name}: {count}" for name, count in counts.items()), *results["notes"]]:
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
