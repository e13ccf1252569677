"""A view = which fields a stage trains on.

demonstrations (SFT), pairs (reward model, DPO), prompts (online RL), ranked responses (curricula) or unpaired
responses (KTO). Each function maps records to records in which these fields are filled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal

from drpo.data.markup import MarkedPrompt
from drpo.data.records import BadRows, DataError, Record, RowError, require_different, require_scores

View = Literal["demonstrations", "pairs", "prompts", "ranked", "unpaired"]
PAIR_SCORES = ("chosen_score", "rejected_score")
NEEDS = {
    "demonstrations": "completion (or messages), chosen + rejected, or responses + scores",
    "pairs": "chosen + rejected, or responses + scores",
    "ranked": "responses + scores, two or more",
    "unpaired": "completion + label, or chosen + rejected",
}


def view_records(records: Sequence[Record], view: View, bad: BadRows) -> tuple[list[Record], list[str]]:
    """Return the records of a view, and notes on what was left out by design.

    Raises DataError when no record at all has what the view needs; single ones that lack it are added to `bad`.
    """
    match view:
        case "demonstrations":
            return demonstrations(records, bad), []
        case "pairs":
            return pairs(records, bad)
        case "prompts":
            return prompts(records)
        case "ranked":
            return ranked(records, bad)
        case "unpaired":
            return unpaired(records, bad), []


def view_name(view: View) -> str:
    """Return the name of a view's examples in reports."""
    match view:
        case "ranked":
            return "ranked rows"
        case "unpaired":
            return "unpaired responses"
        case _:
            return view


def best_response(record: Record) -> str | None:
    """Return the completion, else the (first) response of the highest score, else the chosen one, else None."""
    if record.completion is not None:
        return record.completion
    if record.scores:
        return record.responses[record.scores.index(max(record.scores))]
    return record.chosen


def demonstrations(records: Sequence[Record], bad: BadRows) -> list[Record]:
    """Make one demonstration from each record: its best response, as completion."""
    found = []
    for record in records:
        completion = best_response(record)
        if completion is None:
            bad.add("missing field", record.origin, "nothing to imitate")
        else:
            found.append(replace(record, completion=completion))
    return _require_some(found, records, "demonstrations")


def pairs(records: Sequence[Record], bad: BadRows) -> tuple[list[Record], list[str]]:
    """Make the pair of each record; in ranked data every two responses of unequal score are a pair.

    The response of the higher score is the chosen one; both scores are in `extra`, as chosen_score and
    rejected_score. Where the data has them itself, they must be two numbers.
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
    """Return the record with its chosen_score and rejected_score as floats, if it has them."""
    given = [name for name in PAIR_SCORES if record.extra.get(name) is not None]
    if not given:
        extra = {name: value for name, value in record.extra.items() if name not in PAIR_SCORES}
        return record if len(extra) == len(record.extra) else replace(record, extra=extra)
    if len(given) == 1:
        raise RowError("missing field", f"one of {' and '.join(PAIR_SCORES)} is there, the other is not")
    scores = {name: require_scores([record.extra[name]], name, 1)[0] for name in PAIR_SCORES}
    return replace(record, extra={**record.extra, **scores})


def _unequal_pairs(record: Record) -> Iterator[Record]:
    for i, j in combinations(range(len(record.scores)), 2):
        if record.scores[i] != record.scores[j]:
            yield pair_of(record, *((i, j) if record.scores[i] > record.scores[j] else (j, i)))


def pair_of(record: Record, chosen: int, rejected: int) -> Record:
    """Make the pair of two ranked responses, given by their places, with their scores in `extra`."""
    scores = {"chosen_score": record.scores[chosen], "rejected_score": record.scores[rejected]}
    return Record(
        record.prompt,
        chosen=record.responses[chosen],
        rejected=record.responses[rejected],
        origin=record.origin,
        extra={**record.extra, **scores},
        chat=record.chat,
    )


def ranked(records: Sequence[Record], bad: BadRows) -> tuple[list[Record], list[str]]:
    """Select the records with two or more scored responses."""
    found, num_single = [], 0
    for record in records:
        if len(record.scores) >= 2:
            found.append(record)
        elif record.scores:
            num_single += 1
        else:
            bad.add("missing field", record.origin, "no ranked responses")
    notes = [f"{num_single} rows have a single response: no ranking"] if num_single else []
    return _require_some(found, records, "ranked"), notes


def unpaired(records: Sequence[Record], bad: BadRows) -> list[Record]:
    """Make single responses as completions, good or bad by the bool `label` in their `extra`.

    A completion with a label is one; without a label, the chosen response of a pair is a good one and the rejected
    response a bad one.
    """
    found = []
    for record in records:
        label = record.extra.get("label")
        good = _truth(label)
        if record.completion is not None and good is not None:
            found.append(record if good is label else replace(record, extra={**record.extra, "label": good}))
        elif record.completion is not None and label is not None:
            bad.add("wrong type", record.origin, f"label is {label!r}, not true or false, 1 or 0")
        elif record.chosen is not None and record.rejected is not None:
            for completion, good in ((record.chosen, True), (record.rejected, False)):
                extra = {**record.extra, "label": good}
                found.append(
                    Record(record.prompt, completion, origin=record.origin, extra=extra, chat=record.chat)
                )
        else:
            bad.add("missing field", record.origin, "no completion with a label, and no pair")
    return _require_some(found, records, "unpaired")


def _truth(label: object) -> bool | None:
    """Return a label as a bool, also where it is written as 1 or 0, a number or (in CSV) a text; else None."""
    if isinstance(label, str):
        return {"1": True, "0": False}.get(label.strip())
    return bool(label) if isinstance(label, int | float) and label in (0, 1) else None


def prompts(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """Return the distinct prompts, each with its best response as completion, and notes."""
    distinct, notes = distinct_prompts(records)
    return [replace(record, completion=best_response(record)) for record in distinct], notes


def distinct_prompts(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """Return the first record of each prompt, in order, and a note on the number of others."""
    first: dict[MarkedPrompt, Record] = {}
    for record in records:
        first.setdefault(record.marked_prompt, record)
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
            f"no {view_name(view)}: they need {NEEDS[view]}; these rows have {', '.join(['prompt', *present])}"
        )
    return found
