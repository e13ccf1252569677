"""Compare judges with people, from their files: agreement, its ceiling, habits and win rates."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from drpo.config import ConfigError, Section, refuse, save_resolved
from drpo.data.records import DataError
from eval.labelling.agreement_tables import show_agreement
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
    """What a judge's win in one order and tie in the other count: 0.75, a win here, or 0.5 (tie), a tie."""

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
        "agreement": everybody_together(ratings),
        "people_together": people_together(ratings),
        "ceilings": ceilings(ratings),
        "habits": everybodys_habits(ratings),
        "win_rates": win_rates(ratings),
        "by_confidence": by_confidence(ratings),
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
    show_agreement(results)
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
