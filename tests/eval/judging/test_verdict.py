"""Verdicts of single orders and what both say together, on hand-made tables."""

from __future__ import annotations

import pytest

from eval.judging.matchup import Matchup, Question
from eval.judging.verdict import Judgment, Verdict, combine_all, verdict_on, winner_of

MATCHUP = Matchup("p1", "a post", "x", "four", "y", "seventy", seed=5)


def verdict(order: str, winner: str | None, status: str = "ok") -> Verdict:
    return verdict_on(Question(MATCHUP, order), status, winner)


def combine(verdicts: list[Verdict], *settings, **more) -> Judgment:
    (judgment,) = combine_all(verdicts, *settings, **more)
    return judgment


def test_the_order_is_undone():
    table = {("first", "ab"): "a", ("first", "ba"): "b", ("second", "ab"): "b", ("second", "ba"): "a"}
    for (slot, order), system in table.items():
        assert winner_of(slot, order) == system
        assert verdict(order, system).first_slot_won == (slot == "first")
    assert winner_of("tie", "ab") == winner_of("tie", "ba") == "tie"


# winner when a is shown first, winner when b is: score by half_tie=half, by tie, consistent, slots
TABLE = [
    ("a", "a", 1.0, 1.0, True, (1.0, 0.0)),
    ("b", "b", 0.0, 0.0, True, (0.0, 1.0)),
    ("tie", "tie", 0.5, 0.5, True, (0.5, 0.5)),
    ("a", "b", 0.5, 0.5, False, (1.0, 1.0)),
    ("b", "a", 0.5, 0.5, False, (0.0, 0.0)),
    ("a", "tie", 0.75, 0.5, False, (1.0, 0.5)),
    ("tie", "a", 0.75, 0.5, False, (0.5, 0.0)),
    ("b", "tie", 0.25, 0.5, False, (0.0, 0.5)),
]


@pytest.mark.parametrize(("ab", "ba", "half", "tie", "consistent", "slots"), TABLE)
def test_two_orders(ab, ba, half, tie, consistent, slots):
    verdicts = [verdict("ba", ba), verdict("ab", ab)]
    for half_tie, score in (("half", half), ("tie", tie)):
        judgment = combine(verdicts, half_tie)
        assert judgment.score == score and judgment.consistent is consistent
        assert judgment.first_slot_wins == slots and judgment.statuses == ("ok", "ok")


def test_one_order_alone_decides_but_shows_no_consistency():
    alone = [combine([verdict("ba", w)], orders="one") for w in ("a", "b", "tie")]
    assert [j.score for j in alone] == [1.0, 0.0, 0.5]
    assert [j.consistent for j in alone] == [None] * 3
    with pytest.raises(ValueError, match="where one order was asked"):
        combine([verdict("ba", "a"), verdict("ab", "a")], orders="one")


def test_half_of_a_comparison_decides_nothing():
    """A run was stopped between the two orders: the one that is there may be the vote of the slot."""
    for order in ("ab", "ba"):
        judgment = combine([verdict(order, "a")])
        assert judgment.score is None and judgment.consistent is None and judgment.statuses == ("ok",)


@pytest.mark.parametrize("status", ["refused", "malformed", "truncated", "failed"])
@pytest.mark.parametrize("other", ["a", "b", "tie"])
def test_a_missing_verdict_is_never_imputed(status, other):
    for verdicts in (
        [verdict("ab", other), verdict("ba", None, status)],
        [verdict("ab", None, status), verdict("ba", other)],
        [verdict("ab", None, status)],
    ):
        for half_tie in ("half", "tie"):
            judgment = combine(verdicts, half_tie)
            assert judgment.score is None and judgment.consistent is None
            assert status in judgment.statuses


def test_only_an_ok_verdict_has_a_winner():
    with pytest.raises(ValueError, match="status refused cannot have the winner a"):
        verdict("ab", "a", "refused")
    with pytest.raises(ValueError, match="status ok cannot have the winner None"):
        verdict("ab", None)


def test_a_judgment_knows_lengths_and_suspicions():
    question = Question(MATCHUP, "ab")
    judgment = combine([verdict_on(question, "ok", "a", suspicions_a=("shouts",))], orders="one")
    assert (judgment.length_a, judgment.length_b, judgment.seed) == (4, 7, 5)
    assert judgment.suspected_a and not judgment.suspected_b


def test_comparisons_are_told_apart():
    other = Matchup("p2", "b post", "x", "a", "y", "b")
    verdicts = [
        verdict("ab", "a"),
        verdict_on(Question(other, "ab"), "ok", "b"),
        verdict("ba", "a"),
        verdict_on(Question(other, "ba"), "ok", "b"),
    ]
    assert [(j.prompt_id, j.score) for j in combine_all(verdicts)] == [("p1", 1.0), ("p2", 0.0)]
    assert combine_all([]) == []
    with pytest.raises(ValueError, match="two verdicts on one order"):
        combine([verdicts[0], verdicts[0]])
