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
from eval.labelling.labels import Key, Label, key_of

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
    def pooled(self) -> Rater:
        """All labels as those of one rater (n * annotators,): the annotators of the first row, of the second, ..."""
        names = ("scores", "first_slot", "confidence")
        columns = ([getattr(person, name) for person in self.people] for name in names)
        return Rater("all labels", *(np.ravel(column, order="F") for column in columns))

    @property
    def labels(self) -> Scores:
        """The annotators' scores, one column each (n, annotators)."""
        return self.pooled.scores.reshape(len(self.keys), len(self.people))

    @property
    def num_labels(self) -> NDArray[np.int_]:
        """Number of annotators who decided each row (n,)."""
        return (~np.isnan(self.labels)).sum(axis=1)

    @property
    def majority(self) -> Scores:
        """Mean of the annotators' scores (n,): above 0.5 most votes are for a; a tie is half a vote for each."""
        sums, num_labels = np.nansum(self.labels, axis=1), self.num_labels
        return np.where(num_labels, sums / np.maximum(num_labels, 1), np.nan)


@dataclass
class _Texts:
    """Lengths of the two texts of each matchup and, once a label has given them, their hashes."""

    lengths: dict[Key, tuple[int, int]] = field(default_factory=dict)
    hashes: dict[Key, tuple[str, str]] = field(default_factory=dict)

    def find(
        self, key: Key, lengths: tuple[int, int], hashes: tuple[str, str] | None = None
    ) -> tuple[Key, bool] | None:
        """Return the matchup's key, and whether it has the systems in reverse order; None if its texts differ."""
        prompt_id, a, b, seed = key
        reverse_key = (prompt_id, b, a, seed)
        is_reversed = reverse_key in self.lengths
        if is_reversed:
            key, lengths, hashes = reverse_key, lengths[::-1], hashes and hashes[::-1]
        same_lengths = self.lengths.setdefault(key, lengths) == lengths
        if not same_lengths or (hashes and self.hashes.setdefault(key, hashes) != hashes):
            return None
        return key, is_reversed


_Votes = dict[Key, tuple[float, Sequence[float | None], float | None]]
"A rater's scores of system a, wins of the first slot in each order, and confidence."


def side_by_side(judges: Sequence[JudgeFile], labels: Iterable[Label]) -> Ratings:
    """Combine judgments and current labels (of `load_labels`). Judges with the same name are numbered."""
    texts, left_out = _Texts(), Counter()
    by_judge: dict[str, _Votes] = {}
    for judge in judges:
        count = sum(name == judge.name or name.startswith(f"{judge.name} (") for name in by_judge)
        name = f"{judge.name} ({count + 1})" if count else judge.name
        votes = by_judge.setdefault(name, {})
        for j in judge.judgments:
            place = texts.find(key_of(j), (j.length_a, j.length_b))
            if place is None:
                left_out[f"judgments of {name} on other texts"] += 1
            elif j.score is None:
                left_out[f"judgments of {name} that are undecided"] += 1
            else:
                key, is_reversed = place
                score = 1 - j.score if is_reversed else j.score
                votes[key] = (score, j.first_slot_wins, None)
    by_person: dict[str, _Votes] = {}
    for label in labels:
        if label.score is None:
            left_out["comparisons that an annotator skipped"] += 1
            continue
        place = texts.find(label.key, (label.length_a, label.length_b), (label.hash_a, label.hash_b))
        if place is None:
            left_out["labels of other texts"] += 1
            continue
        key, is_reversed = place
        score = 1 - label.score if is_reversed else label.score
        by_person.setdefault(label.annotator, {})[key] = (score, [label.first_slot_won], label.confidence)
    keys = list(texts.lengths)
    return Ratings(
        keys=keys,
        longer_a=np.array([a - b for a, b in texts.lengths.values()], dtype=np.float64),
        judges=[_rater(name, votes, keys) for name, votes in by_judge.items()],
        people=[_rater(name, votes, keys) for name, votes in sorted(by_person.items())],
        left_out=left_out,
    )


def _rater(name: str, votes: _Votes, keys: Sequence[Key]) -> Rater:
    """Make the arrays of a rater; None and rows without a vote become nan."""
    width = max((len(slots) for _, slots, _ in votes.values()), default=1)
    scores, confidence = np.full((2, len(keys)), np.nan)
    first_slot = np.full((len(keys), width), np.nan)
    for row, key in enumerate(keys):
        if key in votes:
            scores[row], first_slot[row], confidence[row] = votes[key]
    return Rater(name, scores, first_slot if width > 1 else first_slot[:, 0], confidence)
