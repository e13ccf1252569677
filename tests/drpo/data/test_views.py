from __future__ import annotations

import random

import pytest

from drpo.data.records import BadRows, DataError, Record
from drpo.data.views import best_response, view_records

RANKED = Record("r", responses=(" a", " b", " c"), scores=(2.0, 5.0, 5.0), origin="f:1", extra={"id": 1})
PAIR = Record("p", chosen=" yes", rejected=" no", origin="f:2")
DEMONSTRATION = Record("d", completion=" done", origin="f:3")
BARE = Record("b", origin="f:4")


def view(records, name):
    bad = BadRows()
    found, notes = view_records(records, name, bad)
    return found, notes, bad


def test_the_best_response():
    assert best_response(RANKED) == " b"
    assert best_response(PAIR) == " yes"
    assert best_response(DEMONSTRATION) == " done"
    assert best_response(BARE) is None
    everything = Record("x", completion=" c", chosen=" a", rejected=" b", responses=(" r",), scores=(1.0,))
    assert best_response(everything) == " c"
    assert best_response(Record("x", chosen=" a", rejected=" b", responses=(" r",), scores=(1.0,))) == " r"


def test_demonstrations():
    found, notes, bad = view([RANKED, PAIR, DEMONSTRATION, BARE], "demonstrations")
    assert [(record.prompt, record.completion) for record in found] == [
        ("r", " b"),
        ("p", " yes"),
        ("d", " done"),
    ]
    assert found[0].responses == RANKED.responses
    assert bad.counts == {"missing field": 1}
    assert "f:4" in bad.summary()


def test_pairs():
    found, notes, bad = view([RANKED, PAIR, DEMONSTRATION], "pairs")
    assert [(record.prompt, record.chosen, record.rejected) for record in found] == [
        ("r", " b", " a"),
        ("r", " c", " a"),
        ("p", " yes", " no"),
    ]
    assert found[0].extra == {"id": 1, "chosen_score": 5.0, "rejected_score": 2.0}
    assert found[0].origin == "f:1"
    assert found[2] is PAIR
    assert (notes, bad.counts) == ([], {"missing field": 1})


def test_every_unequal_pair_once():
    rng = random.Random(0)
    for _ in range(50):
        scores = tuple(float(rng.randrange(1, 4)) for _ in range(rng.randrange(2, 7)))
        responses = tuple(f" {i}" for i in range(len(scores)))
        expected = {
            (f" {i}", f" {j}") for i, high in enumerate(scores) for j, low in enumerate(scores) if high > low
        }
        found, notes, _ = view([Record("p", responses=responses, scores=scores), PAIR], "pairs")
        pairs = [(record.chosen, record.rejected) for record in found[:-1]]
        assert set(pairs) == expected
        assert len(pairs) == len(expected)
        assert len(notes) == (not expected)


def test_equal_texts_with_unequal_scores_are_bad_pairs():
    twice = Record("p", responses=(" a", " a ", " b"), scores=(1.0, 2.0, 2.0), origin="f:9")
    found, _, bad = view([twice], "pairs")
    assert [(record.chosen, record.rejected) for record in found] == [(" b", " a")]
    assert bad.counts == {"chosen = rejected": 1}


def test_the_scores_of_a_pair_are_two_numbers_or_none():
    def pair(origin, **extra):
        return Record("p", chosen=" yes", rejected=" no", origin=origin, extra=extra)

    nan = float("nan")
    records = [
        pair("f:1", chosen_score=3, rejected_score=1.5, id=1),
        pair("f:2", chosen_score=3),
        pair("f:3", chosen_score="3", rejected_score=1),
        pair("f:4", chosen_score=True, rejected_score=1),
        pair("f:5", chosen_score=3, rejected_score=nan),
        pair("f:6", chosen_score=None, rejected_score=None),
    ]
    found, _, bad = view(records, "pairs")
    assert [record.origin for record in found] == ["f:1", "f:6"]
    assert found[0].extra == {"chosen_score": 3.0, "rejected_score": 1.5, "id": 1}
    assert isinstance(found[0].extra["chosen_score"], float)
    assert bad.counts == {"missing field": 1, "wrong type": 2, "score not finite": 1}
    assert "f:2: one of chosen_score and rejected_score is there" in bad.summary()


def test_ranked_rows_have_two_scored_responses():
    single = Record("s", responses=(" a",), scores=(1.0,), origin="f:5")
    found, notes, bad = view([RANKED, single, PAIR], "ranked")
    assert found == [RANKED]
    assert notes == ["1 rows have a single response: no ranking"]
    assert bad.counts == {"missing field": 1} and "f:2" in bad.summary()


def test_unpaired_responses_are_labelled_completions_or_the_two_of_a_pair():
    def labelled(label, origin, **fields):
        return Record("l", completion=" c", origin=origin, extra={"label": label, "id": 1}, **fields)

    good, bad_one = labelled(True, "f:5"), labelled(False, "f:6", chosen=" x", rejected=" y")
    pair = Record("p", chosen=" yes", rejected=" no", origin="f:2", extra={"id": 2})
    others = [labelled(2, "f:7"), labelled("true", "f:8"), DEMONSTRATION, RANKED]
    found, notes, bad = view([good, pair, bad_one, *others], "unpaired")
    assert found == [
        good,
        Record("p", completion=" yes", origin="f:2", extra={"id": 2, "label": True}),
        Record("p", completion=" no", origin="f:2", extra={"id": 2, "label": False}),
        bad_one,
    ]
    assert bad.counts == {"wrong type": 2, "missing field": 2}
    assert notes == []


@pytest.mark.parametrize(
    ("label", "good"),
    [(1, True), (0, False), (1.0, True), (0.0, False), ("1", True), ("0", False), (2, None), (-1, None)]
    + [(0.5, None), ("yes", None), ([1], None), ({}, None)],
)
def test_a_label_may_be_written_as_one_or_zero(label, good):
    record = Record("l", completion=" c", origin="f:5", extra={"label": label, "id": 1})
    fine = Record("l", completion=" d", extra={"label": True})
    found, _, bad = view([fine, record], "unpaired")
    assert bad.counts == ({"wrong type": 1} if good is None else {})
    assert [r.extra["label"] for r in found[1:]] == ([] if good is None else [good])
    assert all(isinstance(r.extra["label"], bool) for r in found)


def test_prompts_are_distinct_and_keep_every_reset_source():
    again = Record("r", completion=" other", origin="f:7")
    found, notes, bad = view([RANKED, again, PAIR, BARE], "prompts")
    assert [(record.prompt, record.completion) for record in found] == [
        ("r", " b"),
        ("p", " yes"),
        ("b", None),
    ]
    assert found[0].responses == RANKED.responses and found[0].scores == RANKED.scores
    assert (found[1].chosen, found[1].rejected) == (" yes", " no")
    assert notes == ["1 rows repeat a prompt: the first of each is kept"]
    assert len(bad) == 0


@pytest.mark.parametrize(
    ("records", "name", "message"),
    [
        ([BARE], "demonstrations", "no demonstrations: they need completion .*these rows have prompt$"),
        (
            [DEMONSTRATION],
            "pairs",
            r"no pairs: they need chosen \+ rejected.* these rows have prompt, completion",
        ),
        ([PAIR], "ranked", r"no ranked rows: they need responses \+ scores.* have prompt, chosen, rejected"),
        ([RANKED], "unpaired", r"no unpaired responses: they need completion \+ label, or chosen"),
    ],
)
def test_data_that_cannot_give_a_view_at_all(records, name, message):
    with pytest.raises(DataError, match=message):
        view(records, name)


def test_no_records_give_an_empty_view():
    for name in ("demonstrations", "pairs", "prompts", "ranked", "unpaired"):
        assert view([], name)[0] == []
