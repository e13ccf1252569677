from __future__ import annotations

import pickle

import pytest

from drpo.data.records import (
    BadRows,
    DataError,
    Record,
    RowError,
    require_different,
    require_scores,
    require_text,
)


def test_a_record_cannot_be_changed_and_survives_pickling():
    record = Record("p", completion=" c", responses=(" a", " b"), scores=(1.0, 2.0), extra={"id": 7})
    with pytest.raises(AttributeError):
        record.prompt = "q"
    assert pickle.loads(pickle.dumps(record)) == record


def test_bad_rows_are_counted_by_kind_and_only_the_first_few_are_shown():
    bad = BadRows()
    for line in range(1, 6):
        bad.add("empty text", f"f.jsonl:{line}", "chosen")
    bad.add("wrong type", "f.jsonl:9")
    assert len(bad) == 6
    assert bad.counts == {"empty text": 5, "wrong type": 1}
    assert bad.summary().splitlines() == [
        "5 x empty text",
        "    f.jsonl:1: chosen",
        "    f.jsonl:2: chosen",
        "    f.jsonl:3: chosen",
        "    ... and 2 more",
        "1 x wrong type",
        "    f.jsonl:9",
    ]


def test_the_limit_is_a_share_of_all_rows_and_is_itself_allowed():
    bad = BadRows()
    bad.check(0, 0.0)
    bad.add("empty text", "f.jsonl:3")
    bad.check(100, 0.01)
    with pytest.raises(DataError) as error:
        bad.check(99, 0.01)
    message = str(error.value)
    assert "1 of 99 rows" in message
    assert "max_bad_fraction=0.01" in message
    assert "f.jsonl:3" in message
    with pytest.raises(DataError):
        bad.check(100, 0.0)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "missing field"),
        (3, "wrong type"),
        (["a"], "wrong type"),
        ("", "empty text"),
        (" \n\t", "empty text"),
        ("half a pair \ud83d", "invalid text"),
    ],
)
def test_text_that_cannot_be_used_is_refused_by_kind(value, kind):
    with pytest.raises(RowError) as error:
        require_text(value, "chosen")
    assert error.value.kind == kind
    assert "chosen" in error.value.detail


def test_text_is_returned_untouched():
    assert require_text("  a \r\n", "chosen") == "  a \r\n"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "missing field"),
        ("5", "wrong type"),
        ([1, "2"], "wrong type"),
        ([1, True], "wrong type"),
        ([1, None], "wrong type"),
        ([1, float("nan")], "score not finite"),
        ([1, float("-inf")], "score not finite"),
        ([1, 10**400], "score not finite"),
        ([1], "responses and scores differ"),
        ([1, 2, 3], "responses and scores differ"),
    ],
)
def test_scores_that_cannot_be_used_are_refused_by_kind(value, kind):
    with pytest.raises(RowError) as error:
        require_scores(value, "overall", 2)
    assert error.value.kind == kind


def test_scores_become_floats():
    scores = require_scores([7, -0.5], "overall", 2)
    assert scores == (7.0, -0.5)
    assert all(isinstance(score, float) for score in scores)


def test_a_pair_that_differs_in_outer_whitespace_only_is_no_pair():
    require_different(" I can", " I cannot")
    with pytest.raises(RowError) as error:
        require_different(" yes", "yes ")
    assert error.value.kind == "chosen = rejected"
