"""RewardBench 2's score of Ties, by hand."""

from __future__ import annotations

import math

import pytest

from eval.statistics.ties import Margins, margins_of, ties_score


def test_margins_by_hand():
    assert margins_of([3.0, 5.0, 4.0], [1.0, 2.5]) == Margins(gap=0.5, spread=2.0)
    assert margins_of([3.0], [4.0]) == Margins(gap=-1.0, spread=None)
    assert not margins_of([3.0], [3.0]).is_right, "a tie with a wrong response is wrong"


def test_the_score_by_hand():
    """Prompt a passes all; b: gap 3 > 2, but its counterpart's gap is 1; c: spread 0; d has no counterpart."""
    ref = {"a": Margins(4, None), "b": Margins(1, None), "c": Margins(-1, None), "e": Margins(2, None)}
    tied = {"a": Margins(3, 1.5), "b": Margins(3, 2), "c": Margins(0.5, 0), "d": Margins(-2, 1)}
    found = ties_score(ref, tied)
    assert (found.ref_accuracy, found.tied_accuracy) == (3 / 4, 3 / 4)
    assert (found.gap_exceeds_spread, found.both_gaps_exceed) == (1.0, pytest.approx(1 / 3))
    margin = (math.tanh(3 / 1.5 - 1) + math.tanh(1 / 2 - 1)) / 2
    assert found.margin == pytest.approx(margin)
    assert found.overall == pytest.approx(0.3 * 0.75 + 0.3 * 0.75 + 0.2 + 0.2 / 3 + 0.01 * margin)


def test_parts_without_prompts_are_0():
    found = ties_score({"a": Margins(1, None)}, {"b": Margins(2, 1)})
    assert (found.gap_exceeds_spread, found.both_gaps_exceed, found.margin) == (0, 0, 0)
    assert found.overall == pytest.approx(0.6)
