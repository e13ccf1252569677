"""Judges and people side by side: the same matchup is one row, other texts are left out and counted."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from label_runs import BETTER, WORSE, matchups

from drpo.data.records import DataError
from eval.judging.judgments import write_judgments
from eval.judging.verdict import Verdict, combine_all
from eval.labelling.labels import label_of
from eval.labelling.ratings import JudgeFile, read_judge_file, side_by_side

NAN = np.nan
COMPARED = matchups(4)


def verdict(matchup, order, winner, status="ok"):
    c = matchup
    return Verdict(
        *(c.prompt_id, c.system_a, c.system_b, c.seed, order, status, winner),
        *(len(c.response_a), len(c.response_b)),
    )


def judged(*winners, compared=COMPARED, name="judge") -> JudgeFile:
    """A judge whose winners in both orders are those; (None, x) has no verdict in the first."""
    verdicts = [
        verdict(c, order, winner, "ok" if winner else "refused")
        for c, both in zip(compared, winners, strict=False)
        for order, winner in zip(("ab", "ba"), both, strict=True)
    ]
    return JudgeFile(name, "tldr-1", combine_all(verdicts))


def labels(annotator, *winners, compared=COMPARED, order="ab", confidence=None):
    return [
        label_of(c, annotator, "labelled" if w else "skipped", w, order, confidence=confidence)
        for c, w in zip(compared, winners, strict=False)
        if w != "-"
    ]


def turned(matchup):
    """The same matchup, the systems named the other way round."""
    c = matchup
    return replace(
        c, system_a=c.system_b, response_a=c.response_b, system_b=c.system_a, response_b=c.response_a
    )


def test_rows_are_comparisons_and_columns_are_raters():
    judge = judged(("a", "a"), ("a", "b"), ("tie", "b"), (None, "a"))
    ratings = side_by_side([judge], [*labels("ben", "b", "a"), *labels("anna", "-", "tie", None, "a")])
    assert ratings.keys == [(c.prompt_id, BETTER, WORSE, 0) for c in COMPARED]
    (column,) = ratings.judges
    np.testing.assert_array_equal(column.scores, [1, 0.5, 0.25, NAN])
    np.testing.assert_array_equal(column.first_slot, [[1, 0], [1, 1], [0.5, 1], [NAN, NAN]])
    assert [person.name for person in ratings.people] == ["anna", "ben"]
    np.testing.assert_array_equal(ratings.labels, [[NAN, 0], [0.5, 1], [NAN, NAN], [1, NAN]])
    np.testing.assert_array_equal(ratings.majority, [0, 0.75, NAN, 1])
    np.testing.assert_array_equal(ratings.longer_a, [2, 2, 2, 2])  # " topic000 is late", " it is number 0"
    assert ratings.left_out == {
        "judgments of judge that are undecided": 1,
        "comparisons that an annotator skipped": 1,
    }


def test_systems_the_other_way_round_are_the_same_comparison():
    swapped = [turned(c) for c in COMPARED]
    judge, other = (
        judged(("a", "a"), ("b", "b"), ("tie", "a")),
        judged(("b", "b"), compared=swapped, name="other"),
    )
    ratings = side_by_side([judge, other], labels("anna", "b", "b", "tie", compared=swapped, order="ba"))
    np.testing.assert_array_equal(ratings.judges[1].scores, [1, NAN, NAN])
    np.testing.assert_array_equal(ratings.people[0].scores, [1, 1, 0.5])
    np.testing.assert_array_equal(ratings.people[0].first_slot, [1, 1, 0.5])  # the slot is not turned
    assert len(ratings.keys) == 3 and not ratings.left_out


def test_what_was_said_of_other_texts_is_left_out():
    changed = [replace(c, response_a=c.response_a + "!") for c in COMPARED]
    same_length = [replace(c, response_a=c.response_a.upper()) for c in COMPARED]
    judge, other = judged(*[("a", "a")] * 4), judged(*[("b", "b")] * 4, compared=changed, name="other")
    said = [
        *labels("anna", "a", "b"),
        *labels("ben", "a", "b", compared=changed),
        *labels("carl", "a", "b", "tie", compared=same_length),
    ]
    ratings = side_by_side([judge, other], said)
    assert ratings.left_out == {"judgments of other on other texts": 4, "labels of other texts": 4}
    np.testing.assert_array_equal(ratings.people[0].scores, [1, 0, NAN, NAN])
    np.testing.assert_array_equal(
        ratings.people[1].scores, [NAN, NAN, 0.5, NAN]
    )  # nobody had said it of others
    assert np.isnan(ratings.judges[1].scores).all()


def test_seeds_and_systems_tell_comparisons_apart():
    again = [replace(c, seed=1) for c in COMPARED]
    third = [replace(c, system_b="a third") for c in COMPARED]
    judge = judged(("a", "a"))
    ratings = side_by_side(
        [judge], [*labels("anna", "b", compared=again), *labels("ben", "b", compared=third)]
    )
    assert len(ratings.keys) == 3
    np.testing.assert_array_equal(ratings.judges[0].scores, [1, NAN, NAN])
    np.testing.assert_array_equal(ratings.labels, [[NAN, NAN], [0, NAN], [NAN, 0]])


def test_a_judge_asked_in_one_order_has_one_slot():
    verdicts = [verdict(COMPARED[0], "ab", "a"), verdict(COMPARED[1], "ba", "a")]
    ratings = side_by_side(
        [JudgeFile("judge", None, combine_all(verdicts, orders="one"))], labels("anna", "a")
    )
    np.testing.assert_array_equal(ratings.judges[0].first_slot, [1, 0])


def test_judges_of_one_name_get_numbers():
    ratings = side_by_side([judged(("a", "a")), judged(("b", "b")), judged(("a", "b"))], [])
    assert [judge.name for judge in ratings.judges] == ["judge", "judge (2)", "judge (3)"]


def test_confidence_stays_with_its_label():
    ratings = side_by_side([], [*labels("ben", "a", "b"), *labels("anna", "a", "-", "b", confidence=7.0)])
    np.testing.assert_array_equal(ratings.people[0].confidence, [7, NAN, 7])
    assert np.isnan(ratings.people[1].confidence).all()


def test_a_later_label_replaces_the_confidence_as_well():
    again = labels("anna", "b", compared=[turned(COMPARED[0])])
    (anna,) = side_by_side([], [*labels("anna", "b", confidence=7.0), *again]).people
    assert anna.scores.tolist() == [1] and np.isnan(anna.confidence).all()


@pytest.mark.parametrize(
    "orders, half_tie, score", [("both", "half", 0.75), ("both", "tie", 0.5), ("one", "half", 1)]
)
def test_a_judge_file_says_who_judged_and_how(tmp_path, orders, half_tie, score):
    path = tmp_path / "judgments.jsonl"
    verdicts = [verdict(COMPARED[0], "ab", "a"), verdict(COMPARED[0], "ba", "tie")]
    common = {"judge": "gpt-x", "prompt_name": "tldr-1", "orders": orders}
    write_judgments(path, verdicts[: 2 if orders == "both" else 1], [], common)
    judge = read_judge_file(path, half_tie)
    assert (judge.name, judge.question, [j.score for j in judge.judgments]) == ("gpt-x", "tldr-1", [score])


def test_a_file_that_holds_no_judgments(tmp_path):
    path = tmp_path / "judgments.jsonl"
    with pytest.raises(DataError, match="no judgments file"):
        read_judge_file(path)
    path.write_text(json.dumps({"a": 1}))
    with pytest.raises(DataError, match="is not a judgment"):
        read_judge_file(path)
