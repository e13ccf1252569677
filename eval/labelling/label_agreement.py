"""Agreement of judges with people and of people with each other, and effects of the first slot and the length."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from eval.labelling.ratings import Ratings, Scores
from eval.statistics.agreement import Agreement, HumanCeiling, agreement, human_ceiling
from eval.statistics.intervals import Interval
from eval.statistics.position_bias import PositionBias, position_bias
from eval.statistics.win_rate import PairedTest, WinRate, paired_test, win_rate

MAJORITY = "majority"
ALL_LABELS = "all labels"


@dataclass(frozen=True)
class Together:
    """Agreement of two raters on the matchups that both decided."""

    kind: str
    "judge and person, judge and majority, judge and judge, or person and person."
    rater_1: str
    rater_2: str
    agreement: Agreement


@dataclass(frozen=True)
class Ceiling:
    """Agreement of a judge with people, on the matchups with several labels."""

    judge: str
    ceiling: HumanCeiling


@dataclass(frozen=True)
class PeopleTogether:
    """Agreement and kappa of two annotators of a matchup, over the `num_pairs` with several labels."""

    num_pairs: int
    agreement: Interval
    kappa: float
    kappa_low: float
    kappa_high: float


@dataclass(frozen=True)
class Habits:
    """Statistics of all verdicts of a rater."""

    name: str
    kind: str
    "judge, person or people."
    num_verdicts: int
    ties: float
    "Share of ties."
    position: PositionBias | None
    "None where the order is unknown."
    longer_wins: WinRate | None
    "Win rate of the longer response, in characters; None where all lengths are equal."


@dataclass(frozen=True)
class SystemWinRate:
    """Win rate of system a, by a judge and by the majority of people, on the matchups that both decided."""

    judge: str
    system_a: str
    system_b: str
    by_judge: WinRate
    by_people: WinRate
    difference: PairedTest
    "The judge's minus the people's."


@dataclass(frozen=True)
class ByConfidence:
    """Agreement of a judge with the labels of one level of confidence, each label a row."""

    judge: str
    confidence: float
    agreement: Agreement


# --- agreement ------------------------------------------------------------------------------------------


def everybody_together(ratings: Ratings) -> list[Together]:
    """Compare judges with each annotator and the majority of several, judges in pairs, and annotators in pairs.

    Pairs without a matchup that both decided are omitted.
    """
    prompt_ids = ratings.prompt_ids
    judges = [(judge.name, judge.scores) for judge in ratings.judges]
    people = [(person.name, person.scores) for person in ratings.people]
    crowd = [(MAJORITY, ratings.majority)] if len(people) > 1 else []
    pairs = [
        *(("judge and majority", judge, one) for judge in judges for one in crowd),
        *(("judge and person", judge, person) for judge in judges for person in people),
        *(("judge and judge", *two) for two in combinations(judges, 2)),
        *(("person and person", *two) for two in combinations(people, 2)),
    ]
    return [
        Together(kind, name_1, name_2, agreement(scores_1, scores_2, prompt_ids))
        for kind, (name_1, scores_1), (name_2, scores_2) in pairs
        if _num_shared(scores_1, scores_2)
    ]


def ceilings(ratings: Ratings) -> list[Ceiling]:
    """Compare each judge with people on the matchups with several labels; empty without these."""
    several, prompt_ids = _several_labels(ratings), ratings.prompt_ids
    found = []
    for judge in ratings.judges:
        rows = several & ~np.isnan(judge.scores)
        if rows.any():
            ceiling = human_ceiling(judge.scores[rows], ratings.labels[rows], prompt_ids[rows])
            found.append(Ceiling(judge.name, ceiling))
    return found


def people_together(ratings: Ratings) -> PeopleTogether | None:
    """Compute how often people agree on all matchups with several labels; None without these."""
    rows = _several_labels(ratings)
    if not rows.any():
        return None
    anything = np.ones(rows.sum())  # the human part of the result is independent of the judge's verdicts
    found = human_ceiling(anything, ratings.labels[rows], ratings.prompt_ids[rows], num_resamples=99)
    return PeopleTogether(found.num_pairs, found.humans, found.human_kappa, *found.human_kappa_limits)


def by_confidence(ratings: Ratings) -> list[ByConfidence]:
    """Compare each judge with the labels of each level of confidence, where the data contains one."""
    if not ratings.people:
        return []
    labels = ratings.labels.ravel()
    levels = np.stack([person.confidence for person in ratings.people], axis=1).ravel()
    prompt_ids = np.repeat(ratings.prompt_ids, len(ratings.people))
    found = []
    for judge in ratings.judges:
        scores = np.repeat(judge.scores, len(ratings.people))
        for level in np.unique(levels[~np.isnan(levels)]):
            of_level = levels == level
            if _num_shared(scores[of_level], labels[of_level]):
                measured = agreement(scores[of_level], labels[of_level], prompt_ids[of_level])
                found.append(ByConfidence(judge.name, float(level), measured))
    return found


def _several_labels(ratings: Ratings) -> NDArray[np.bool_]:
    """Return (n,): whether at least two annotators decided the matchup."""
    if len(ratings.people) < 2:
        return np.zeros(len(ratings.keys), dtype=bool)
    return (~np.isnan(ratings.labels)).sum(axis=1) >= 2


def _num_shared(scores_1: Scores, scores_2: Scores) -> int:
    return int((~np.isnan(scores_1) & ~np.isnan(scores_2)).sum())


# --- habits ---------------------------------------------------------------------------------------------


def everybodys_habits(ratings: Ratings) -> list[Habits]:
    """Compute ties, first slot and length of each judge, of all labels together, and of each annotator."""
    prompt_ids = ratings.prompt_ids
    found = [
        _habits(judge.name, "judge", judge.scores, judge.first_slot, ratings.longer_a, prompt_ids)
        for judge in ratings.judges
    ]
    people = ratings.people
    if len(people) > 1:
        slots = np.stack([person.first_slot for person in people], axis=1).ravel()
        longer_a, all_ids = np.repeat(ratings.longer_a, len(people)), np.repeat(prompt_ids, len(people))
        found.append(_habits(ALL_LABELS, "people", ratings.labels.ravel(), slots, longer_a, all_ids))
    return found + [
        _habits(person.name, "person", person.scores, person.first_slot, ratings.longer_a, prompt_ids)
        for person in people
    ]


def _habits(
    name: str, kind: str, scores: Scores, slots: Scores, longer_a: Scores, prompt_ids: NDArray[np.str_]
) -> Habits:
    decided = ~np.isnan(scores)
    scores, slots, longer_a, prompt_ids = (x[decided] for x in (scores, slots, longer_a, prompt_ids))
    of_longer = np.where(longer_a > 0, scores, np.where(longer_a < 0, 1 - scores, np.nan))
    return Habits(
        name,
        kind,
        num_verdicts=len(scores),
        ties=float((scores == 0.5).mean()),
        position=None if np.isnan(slots).all() else position_bias(slots, prompt_ids),
        longer_wins=None if np.isnan(of_longer).all() else win_rate(of_longer, prompt_ids),
    )


def win_rates(ratings: Ratings) -> list[SystemWinRate]:
    """Compute the win rate of each pair of systems by each judge and by the majority of people."""
    if not ratings.people:
        return []
    systems = np.array([f"{a}\0{b}" for _, a, b, _ in ratings.keys])
    majority, prompt_ids = ratings.majority, ratings.prompt_ids
    found = []
    for judge in ratings.judges:
        both = ~np.isnan(judge.scores) & ~np.isnan(majority)
        for pair in dict.fromkeys(systems[both]):
            rows = both & (systems == pair)
            by_judge, by_people = judge.scores[rows], majority[rows]
            ids = prompt_ids[rows]
            found.append(
                SystemWinRate(
                    judge.name,
                    *pair.split("\0"),
                    by_judge=win_rate(by_judge, ids),
                    by_people=win_rate(by_people, ids),
                    difference=paired_test(by_judge, by_people, ids),
                )
            )
    return found
