"""What a trainer sees of the records: demonstrations (SFT), pairs (reward model, DPO) or prompts (online
RL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal

from drpo.data.records import BadRows, DataError, Record, RowError, require_different, require_scores

View = Literal["demonstrations", "pairs", "prompts"]
PAIR_SCORES = ("chosen_score", "rejected_score")
NEEDS = {
    "demonstrations": "completion (or messages), chosen + rejected, or responses + scores",
    "pairs": "chosen + rejected, or responses + scores",
}


def view_records(records: Sequence[Record], view: View, bad: BadRows) -> tuple[list[Record], list[str]]:
    """The records of a view, and notes on what was left out by design.

    Raises DataError when no record at all has what the view needs; single ones that lack it are added to
    `bad`.
    """
    match view:
        case "demonstrations":
            return demonstrations(records, bad), []
        case "pairs":
            return pairs(records, bad)
        case "prompts":
            return prompts(records)


def best_response(record: Record) -> str | None:
    """The completion, else the (first) response of the highest score, else the chosen one, else None."""
    if record.completion is not None:
        return record.completion
    if record.scores:
        return record.responses[record.scores.index(max(record.scores))]
    return record.chosen


def demonstrations(records: Sequence[Record], bad: BadRows) -> list[Record]:
    """One demonstration from each record, as its completion: its best response."""
    found = []
    for record in records:
        completion = best_response(record)
        if completion is None:
            bad.add("missing field", record.origin, "nothing to imitate")
        else:
            found.append(replace(record, completion=completion))
    return _require_some(found, records, "demonstrations")


def pairs(records: Sequence[Record], bad: BadRows) -> tuple[list[Record], list[str]]:
    """The pair of each record; of ranked data every two responses of unequal score, once, the higher one
    chosen.

    The scores of such a pair are in its `extra`, as chosen_score and rejected_score. Where the data has
    them, they must be two numbers.
    """
    found, num_ties, num_ranked = [], 0, 0
    for record in records:
        if record.chosen is not None and record.rejected is not None:
            try:
                found.append(_with_pair_scores(record))
            except RowError as error:
                bad.add(error.kind, record.origin, error.detail)
        elif record.scores:
            num_ranked += 1
            unequal = list(_unequal_pairs(record))
            num_ties += not unequal
            for pair in unequal:
                try:
                    require_different(pair.chosen, pair.rejected)
                    found.append(pair)
                except RowError as error:
                    bad.add(error.kind, pair.origin, error.detail)
        else:
            bad.add("missing field", record.origin, "no pair")
    notes = (
        [f"{num_ties} of {num_ranked} ranked rows have no two unequal scores: no pair"] if num_ties else []
    )
    return _require_some(found, records, "pairs"), notes


def _with_pair_scores(record: Record) -> Record:
    """The record with its chosen_score and rejected_score as floats, if it has them."""
    given = [name for name in PAIR_SCORES if record.extra.get(name) is not None]
    if not given:
        return record
    if len(given) == 1:
        raise RowError("missing field", f"one of {' and '.join(PAIR_SCORES)} is there, the other is not")
    scores = {name: require_scores([record.extra[name]], name, 1)[0] for name in PAIR_SCORES}
    return replace(record, extra={**record.extra, **scores})


def _unequal_pairs(record: Record):
    for (response, score), (other, other_score) in combinations(
        zip(record.responses, record.scores, strict=True), 2
    ):
        if score == other_score:
            continue
        chosen, rejected = (response, other) if score > other_score else (other, response)
        scores = {"chosen_score": max(score, other_score), "rejected_score": min(score, other_score)}
        extra = {**record.extra, **scores}
        yield Record(record.prompt, chosen=chosen, rejected=rejected, origin=record.origin, extra=extra)


def prompts(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """Each distinct prompt once, as `distinct_prompts` gives it, with its best response as completion."""
    distinct, notes = distinct_prompts(records)
    return [replace(record, completion=best_response(record)) for record in distinct], notes


def distinct_prompts(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """The first record of each prompt, in order, and a note on how many others there were."""
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(record.prompt, record)
    num_repeats = len(records) - len(first)
    notes = [f"{num_repeats} rows repeat a prompt: the first of each is kept"] if num_repeats else []
    return list(first.values()), notes


def _require_some(found: list[Record], records: Sequence[Record], view: View) -> list[Record]:
    if records and not found:
        present = [
            name
            for name in ("completion", "chosen", "rejected", "responses", "scores")
            if any(getattr(record, name) for record in records)
        ]
        raise DataError(
            f"no {view}: they need {NEEDS[view]}; these rows have {', '.join(['prompt', *present])}"
        )
    return found
