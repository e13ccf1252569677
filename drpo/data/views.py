"""A view = which fields a stage trains on.

demonstrations (SFT), pairs (reward model, DPO), prompts (online RL), ranked responses (curricula) or unpaired
responses (KTO). A view is made of records in which these fields are filled.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    if view == "prompts":
        distinct, notes = distinct_prompts(records)
        return [replace(record, completion=best_response(record)) for record in distinct], notes
    converted, num_without = [], 0
    for record in records:
        with bad.skipping(record.origin):
            examples = CONVERSIONS[view](record)
            num_without += not examples
            for example in examples:
                with bad.skipping(example.origin):  # a bad pair of ranked responses leaves the others
                    if view == "pairs":
                        require_different(example.chosen, example.rejected)
                    converted.append(example)
    if records and not converted:
        fields = ("completion", "chosen", "rejected", "responses", "scores")
        present = [name for name in fields if any(getattr(record, name) for record in records)]
        raise DataError(
            f"no {view_name(view)}: they need {NEEDS[view]}; these rows have {', '.join(['prompt', *present])}"
        )
    if not num_without:
        return converted, []
    if view == "ranked":
        return converted, [f"{num_without} rows have a single response: no ranking"]
    num_ranked = sum(bool(record.scores) and not _is_pair(record) for record in records)
    return converted, [f"{num_without} of {num_ranked} ranked rows have no two unequal scores: no pair"]


def view_name(view: View) -> str:
    """Return the name of a view's examples in reports."""
    return {"ranked": "ranked rows", "unpaired": "unpaired responses"}.get(view, view)


def best_response(record: Record) -> str | None:
    """Return the completion, else the (first) response of the highest score, else the chosen one, else None."""
    if record.completion is not None:
        return record.completion
    if record.scores:
        return record.responses[record.scores.index(max(record.scores))]
    return record.chosen


def _is_pair(record: Record) -> bool:
    return record.chosen is not None and record.rejected is not None


def _demonstration(record: Record) -> list[Record]:
    """Make one demonstration: the best response, as completion."""
    completion = best_response(record)
    if completion is None:
        raise RowError("missing field", "nothing to imitate")
    return [replace(record, completion=completion)]


def _pairs(record: Record) -> list[Record]:
    """Make the pair of a record; in ranked data every two responses of unequal score are a pair.

    The response of the higher score is the chosen one; both scores are in `extra`, as chosen_score and
    rejected_score. Where the data has them itself, they must be two numbers.
    """
    if _is_pair(record):
        return [_with_pair_scores(record)]
    if not record.scores:
        raise RowError("missing field", "no pair")
    places = combinations(range(len(record.scores)), 2)
    ordered = [(i, j) if record.scores[i] > record.scores[j] else (j, i) for i, j in places]
    return [pair_of(record, i, j) for i, j in ordered if record.scores[i] != record.scores[j]]


def _with_pair_scores(record: Record) -> Record:
    """Return the record with its chosen_score and rejected_score as floats, if it has them."""
    present = [name for name in PAIR_SCORES if record.extra.get(name) is not None]
    if not present:
        extra = {name: value for name, value in record.extra.items() if name not in PAIR_SCORES}
        return record if len(extra) == len(record.extra) else replace(record, extra=extra)
    if len(present) == 1:
        raise RowError("missing field", f"one of {' and '.join(PAIR_SCORES)} is there, the other is not")
    scores = {name: require_scores([record.extra[name]], name, 1)[0] for name in PAIR_SCORES}
    return replace(record, extra={**record.extra, **scores})


def pair_of(record: Record, chosen: int, rejected: int) -> Record:
    """Make the pair of two ranked responses, given by their places, with their scores in `extra`."""
    scores = {"chosen_score": record.scores[chosen], "rejected_score": record.scores[rejected]}
    texts = {"completion": None, "chosen": record.responses[chosen], "rejected": record.responses[rejected]}
    return replace(record, **texts, responses=(), scores=(), extra={**record.extra, **scores})


def _ranked(record: Record) -> list[Record]:
    """Select a record with two or more scored responses."""
    if not record.scores:
        raise RowError("missing field", "no ranked responses")
    return [record] if len(record.scores) >= 2 else []


def _unpaired(record: Record) -> list[Record]:
    """Make single responses as completions, good or bad by the bool `label` in their `extra`.

    A completion with a label is one; without a label, the chosen response of a pair is a good one and the rejected
    response a bad one.
    """
    label = record.extra.get("label")
    if record.completion is not None and label is not None:
        good = _truth(label)
        if good is None:
            raise RowError("wrong type", f"label is {label!r}, not true or false, 1 or 0")
        return [record if good is label else replace(record, extra={**record.extra, "label": good})]
    if not _is_pair(record):
        raise RowError("missing field", "no completion with a label, and no pair")
    return [
        Record(
            record.prompt, text, origin=record.origin, extra={**record.extra, "label": good}, chat=record.chat
        )
        for text, good in ((record.chosen, True), (record.rejected, False))
    ]


def _truth(label: object) -> bool | None:
    """Return a label as a bool, also where it is written as 1 or 0, a number or (in CSV) a text; else None."""
    if isinstance(label, str):
        return {"1": True, "0": False}.get(label.strip())
    return bool(label) if isinstance(label, int | float) and label in (0, 1) else None


CONVERSIONS = {"demonstrations": _demonstration, "pairs": _pairs, "ranked": _ranked, "unpaired": _unpaired}
"The records of a view that a record gives: none, one or several; RowError if it lacks what the view needs."


def distinct_prompts(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """Return the first record of each prompt, in order, and a note on the number of others."""
    first_records: dict[MarkedPrompt, Record] = {}
    for record in records:
        first_records.setdefault(record.marked_prompt, record)
    num_repeats = len(records) - len(first_records)
    notes = [f"{num_repeats} rows repeat a prompt: the first of each is kept"] if num_repeats else []
    return list(first_records.values()), notes
