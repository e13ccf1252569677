"""Ratings of judges and people in one matrix, with one row per matchup.

Matchups are the same when prompt, systems and seed are, even where a file has the two systems in reverse order. The
first file with a matchup determines its texts: ratings of other texts are dropped and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from drpo.jsonl import lines_of
from eval.judging.judgments import read_verdicts
from eval.judging.verdict import HalfTie, Judgment, combine_all
from eval.labelling.labels import Key, Label

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class JudgeFile:
    """The judgments of one file, and the judge."""

    name: str
    question: str | None
    "Name of the prompt; None for a judge without one, such as a reward model."
    judgments: list[Judgment]


def read_judge_file(path: Path | str, half_tie: HalfTie = "half") -> JudgeFile:
    """Read a judgments file with its verdicts combined. Raises DataError as `read_verdicts` does."""
    verdicts = read_verdicts(path)
    first = next((json.loads(line) for _, line in lines_of(Path(path).read_bytes())), {})
    judgments = combine_all(verdicts, half_tie, first.get("orders", "both"))
    return JudgeFile(str(first.get("judge", path)), first.get("prompt_name"), judgments)


@dataclass(frozen=True)
class Rater:
    """A judge or an annotator; nan in the rows without a verdict."""

    name: str
    scores: Scores
    "Scores of system a (n,)."
    first_slot: Scores
    "Whether the first slot won: (n, 2) for a judge that was asked in both orders, else (n,)."
    confidence: Scores
    "On the data's own scale (n,)."


@dataclass(frozen=True)
class Ratings:
    """The scores of all raters for the matchups `keys`."""

    keys: list[Key]
    longer_a: Scores
    "Characters of system a's response minus those of system b's (n,)."
    judges: list[Rater]
    people: list[Rater]
    "Sorted by name."
    left_out: Counter[str]
    "Number of unused judgments and labels, by reason."

    @property
    def prompt_ids(self) -> NDArray[np.str_]:
        """The prompt of each row (n,)."""
        return np.array([key[0] for key in self.keys])

    @property
    def labels(self) -> Scores:
        """The annotators' scores, one column each (n, annotators)."""
        return np.stack([person.scores for person in self.people], axis=1)

    @property
    def majority(self) -> Scores:
        """Mean of the annotators' scores (n,): above 0.5 most votes are for a; a tie is half a vote for each."""
        num_labels = (~np.isnan(self.labels)).sum(axis=1)
        return np.where(num_labels, np.nansum(self.labels, axis=1) / np.maximum(num_labels, 1), np.nan)


@dataclass
class _Said:
    """One rater's verdicts, by row."""

    scores: dict[int, float] = field(default_factory=dict)
    slots: dict[int, Sequence[float]] = field(default_factory=dict)
    confidence: dict[int, float] = field(default_factory=dict)

    def rater(self, name: str, num_rows: int) -> Rater:
        width = max(map(len, self.slots.values()), default=1)
        slots = np.full((num_rows, width), np.nan)
        for row, won in self.slots.items():
            slots[row, : len(won)] = won
        columns = []
        for values in (self.scores, self.confidence):
            column = np.full(num_rows, np.nan)
            column[list(values)] = list(values.values())
            columns.append(column)
        return Rater(name, columns[0], slots if width > 1 else slots[:, 0], columns[1])


class _Rows:
    """The matchups so far, with the lengths and, once a label has given them, the hashes of their two texts."""

    def __init__(self) -> None:
        self.index: dict[Key, int] = {}
        self.lengths: list[tuple[int, int]] = []
        self._hashes: dict[int, tuple[str, str]] = {}

    def find(
        self, key: Key, lengths: tuple[int, int], hashes: tuple[str, str] | None = None
    ) -> tuple[int, bool] | None:
        """Return the row, and whether its systems are in reverse order; None if its texts differ."""
        prompt_id, a, b, seed = key
        turned = (prompt_id, b, a, seed) in self.index
        if turned:
            key, lengths, hashes = (prompt_id, b, a, seed), lengths[::-1], hashes and hashes[::-1]
        row = self.index.setdefault(key, len(self.index))
        if row == len(self.lengths):
            self.lengths.append(lengths)
        if lengths != self.lengths[row] or (hashes and self._hashes.setdefault(row, hashes) != hashes):
            return None
        return row, turned


def side_by_side(judges: Sequence[JudgeFile], labels: Iterable[Label]) -> Ratings:
    """Combine judgments and current labels (of `load_labels`). Judges with the same name are numbered."""
    rows, left_out = _Rows(), Counter()
    by_judge: dict[str, _Said] = {}
    for judge in judges:
        count = sum(name == judge.name or name.startswith(f"{judge.name} (") for name in by_judge)
        name = f"{judge.name} ({count + 1})" if count else judge.name
        said = by_judge.setdefault(name, _Said())
        for j in judge.judgments:
            place = rows.find((j.prompt_id, j.system_a, j.system_b, j.seed), (j.length_a, j.length_b))
            if place is None:
                left_out[f"judgments of {name} on other texts"] += 1
            elif j.score is None:
                left_out[f"judgments of {name} that are undecided"] += 1
            else:
                _note(said, place, j.score, [np.nan if won is None else won for won in j.first_slot_wins])
    by_person: dict[str, _Said] = {}
    for label in labels:
        if label.score is None:
            left_out["comparisons that an annotator skipped"] += 1
            continue
        place = rows.find(label.key, (label.length_a, label.length_b), (label.hash_a, label.hash_b))
        if place is None:
            left_out["labels of other texts"] += 1
            continue
        slot = np.nan if label.first_slot_won is None else label.first_slot_won
        said = by_person.setdefault(label.annotator, _Said())
        _note(said, place, label.score, [slot])
        if label.confidence is not None:
            said.confidence[place[0]] = label.confidence
    num_rows = len(rows.index)
    return Ratings(
        keys=list(rows.index),
        longer_a=np.array([a - b for a, b in rows.lengths], dtype=np.float64),
        judges=[said.rater(name, num_rows) for name, said in by_judge.items()],
        people=[said.rater(name, num_rows) for name, said in sorted(by_person.items())],
        left_out=left_out,
    )


def _note(said: _Said, place: tuple[int, bool], score: float, slots: Sequence[float]) -> None:
    row, turned = place
    said.scores[row] = 1 - score if turned else score
    said.slots[row] = slots
