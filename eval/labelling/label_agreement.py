"""Agreement of judges with people and of people with each other, and effects of the first slot and the length."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, compress, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.labelling.ratings import Rater, Ratings, Scores
from eval.statistics.agreement import Agreement, HumanCeiling, agreement, human_ceiling
from eval.statistics.intervals import Interval
from eval.statistics.position_bias import PositionBias, position_bias
from eval.statistics.win_rate import PairedTest, WinRate, paired_test, win_rate


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


def compare_raters(ratings: Ratings) -> dict[str, Any]:
    """Compute everything about the raters that agreement.json contains."""
    return {
        "agreement": pairwise_agreement(ratings),
        "people_together": people_together(ratings),
        "ceilings": ceilings(ratings),
        "habits": rater_habits(ratings),
        "win_rates": win_rates(ratings),
        "by_confidence": by_confidence(ratings),
    }


# --- agreement ------------------------------------------------------------------------------------------


def pairwise_agreement(ratings: Ratings) -> list[Together]:
    """Compare judges with each annotator and the majority of several, judges in pairs, and annotators in pairs.

    Pairs without a matchup that both decided are omitted.
    """
    judges = [(judge.name, judge.scores) for judge in ratings.judges]
    people = [(person.name, person.scores) for person in ratings.people]
    majorities = [("majority", ratings.majority)] if len(people) > 1 else []
    pairs = [
        *(("judge and majority", *pair) for pair in product(judges, majorities)),
        *(("judge and person", *pair) for pair in product(judges, people)),
        *(("judge and judge", *pair) for pair in combinations(judges, 2)),
        *(("person and person", *pair) for pair in combinations(people, 2)),
    ]
    return [
        Together(kind, name_1, name_2, agreement(scores_1, scores_2, ratings.prompt_ids))
        for kind, (name_1, scores_1), (name_2, scores_2) in pairs
        if _both_decided(scores_1, scores_2).any()
    ]


def ceilings(ratings: Ratings) -> list[Ceiling]:
    """Compare each judge with people on the matchups with several labels; empty without these."""
    rows_of_judges = [(ratings.num_labels > 1) & ~np.isnan(judge.scores) for judge in ratings.judges]
    return [
        Ceiling(judge.name, human_ceiling(judge.scores[rows], ratings.labels[rows], ratings.prompt_ids[rows]))
        for judge, rows in zip(ratings.judges, rows_of_judges, strict=True)
        if rows.any()
    ]


def people_together(ratings: Ratings) -> PeopleTogether | None:
    """Compute how often people agree on all matchups with several labels; None without these."""
    rows = ratings.num_labels > 1
    if not rows.any():
        return None
    any_scores = np.ones(rows.sum())  # the human part of the result is independent of the judge's verdicts
    people = human_ceiling(any_scores, ratings.labels[rows], ratings.prompt_ids[rows], num_resamples=99)
    return PeopleTogether(people.num_pairs, people.humans, people.human_kappa, *people.human_kappa_limits)


def by_confidence(ratings: Ratings) -> list[ByConfidence]:
    """Compare each judge with the labels of each level of confidence, where the data contains one."""
    labels, levels = ratings.pooled.scores, ratings.pooled.confidence
    prompt_ids = np.repeat(ratings.prompt_ids, len(ratings.people))
    results = []
    for judge in ratings.judges:
        scores = np.repeat(judge.scores, len(ratings.people))
        for level in np.unique(levels[~np.isnan(levels)]):
            rows = levels == level
            if _both_decided(scores[rows], labels[rows]).any():
                measured = agreement(scores[rows], labels[rows], prompt_ids[rows])
                results.append(ByConfidence(judge.name, float(level), measured))
    return results


def _both_decided(scores_1: Scores, scores_2: Scores) -> NDArray[np.bool_]:
    return ~np.isnan(scores_1) & ~np.isnan(scores_2)


# --- habits ---------------------------------------------------------------------------------------------


def rater_habits(ratings: Ratings) -> list[Habits]:
    """Compute ties, first slot and length of each judge, of all labels together, and of each annotator."""
    longer_a, prompt_ids, num_people = ratings.longer_a, ratings.prompt_ids, len(ratings.people)
    habits = [_habits("judge", judge, longer_a, prompt_ids) for judge in ratings.judges]
    if num_people > 1:
        repeated = np.repeat(longer_a, num_people), np.repeat(prompt_ids, num_people)
        habits.append(_habits("people", ratings.pooled, *repeated))
    return habits + [_habits("person", person, longer_a, prompt_ids) for person in ratings.people]


def _habits(kind: str, rater: Rater, longer_a: Scores, prompt_ids: NDArray[np.str_]) -> Habits:
    decided = ~np.isnan(rater.scores)
    columns = (rater.scores, rater.first_slot, longer_a, prompt_ids)
    scores, slots, longer_a, prompt_ids = (column[decided] for column in columns)
    of_longer = np.where(longer_a > 0, scores, np.where(longer_a < 0, 1 - scores, np.nan))
    return Habits(
        rater.name,
        kind,
        num_verdicts=len(scores),
        ties=float((scores == 0.5).mean()),
        position=None if np.isnan(slots).all() else position_bias(slots, prompt_ids),
        longer_wins=None if np.isnan(of_longer).all() else win_rate(of_longer, prompt_ids),
    )


def win_rates(ratings: Ratings) -> list[SystemWinRate]:
    """Compute the win rate of each pair of systems by each judge and by the majority of people."""
    pairs = [(system_a, system_b) for _, system_a, system_b, _ in ratings.keys]
    majority, prompt_ids = ratings.majority, ratings.prompt_ids
    results = []
    for judge in ratings.judges:
        decided = _both_decided(judge.scores, majority)
        for pair in dict.fromkeys(compress(pairs, decided)):
            rows = decided & [other == pair for other in pairs]
            by_judge, by_people, ids = judge.scores[rows], majority[rows], prompt_ids[rows]
            rates = win_rate(by_judge, ids), win_rate(by_people, ids), paired_test(by_judge, by_people, ids)
            results.append(SystemWinRate(judge.name, *pair, *rates))
    return results
