"""From pairs and ranked rows to rankings: what is one example, and what is left out."""

from __future__ import annotations

import pytest
import torch

from drpo.data.encode import Example
from drpo.data.records import DataError, Record
from reward_models.rankings import Ranking, collate_rankings, pair_rankings, ranked_rankings

CPU = torch.device("cpu")


def pair(prompt: str, chosen: list[int], rejected: list[int], **scores: float) -> Example:
    return Example(
        Record(prompt, origin="p.jsonl:3", extra=scores), [3, 4], chosen_ids=chosen, rejected_ids=rejected
    )


def ranked(responses: list[list[int]], *scores: float) -> Example:
    texts = tuple(map(str, responses))
    return Example(Record("a", responses=texts, scores=scores, origin="r.jsonl:7"), [5], ranked_ids=responses)


PAIRS = [
    pair("a", [7, 1], [8, 1]),
    pair("b", [9, 1], [7, 1]),
    pair("a", [8, 1], [9, 9, 1]),
    pair("a", [7, 1], [8, 1]),
]


def test_pairs_apart_are_two_responses_each():
    rankings = pair_rankings(PAIRS, by_prompt=False, needs_gaps=False)
    assert len(rankings) == 4
    assert rankings[2] == Ranking([3, 4], [[8, 1], [9, 9, 1]], [(0, 1, 0.0)], [])


def test_pairs_of_a_prompt_share_their_distinct_responses():
    first, second = pair_rankings(PAIRS, by_prompt=True, needs_gaps=False)
    assert first.response_ids == [[7, 1], [8, 1], [9, 9, 1]]
    assert first.comparisons == [(0, 1, 0.0), (1, 2, 0.0), (0, 1, 0.0)], (
        "a pair that comes twice counts twice"
    )
    assert first.best == 0 and second.response_ids == [[9, 1], [7, 1]]


def test_gaps_are_those_of_the_scores():
    found = pair_rankings([pair("a", [7], [8], chosen_score=4.5, rejected_score=1.0)], False, needs_gaps=True)
    assert found[0].comparisons == [(0, 1, 3.5)]
    with pytest.raises(DataError, match="p.jsonl:3: loss.margin_scale needs chosen_score and rejected_score"):
        pair_rankings(PAIRS, False, needs_gaps=True)


def test_ranked_rows_have_every_comparison_of_unequal_scores():
    [found], notes = ranked_rankings([ranked([[7], [8], [9], [6]], 2.0, 5.0, 2.0, 1.0)])
    assert not notes
    assert found.ranks == [1, 0, 1, 2] and found.best == 1
    assert sorted(found.comparisons) == [(0, 3, 1.0), (1, 0, 3.0), (1, 2, 3.0), (1, 3, 4.0), (2, 3, 1.0)]


def test_ranked_rows_without_an_order_are_left_out_and_counted():
    rows = [
        ranked([[7], [8]], 1.0, 1.0),
        ranked([[7], [7], [8]], 2.0, 2.0, 1.0),
        ranked([[7], [7]], 1.0, 2.0),
    ]
    [found], notes = ranked_rankings(rows)
    assert found.response_ids == [[7], [8]] and found.ranks == [0, 1]
    assert "1 of 3 ranked rows left out:\n1 x equal responses of unequal score\n    r.jsonl:7" in notes[0]
    assert notes[1] == "1 ranked rows have no two unequal scores: left out"
    with pytest.raises(DataError, match="no ranked rows are left to train on"):
        ranked_rankings(rows[2:])


def test_a_batch_is_blocks_of_responses_padded_where_a_ranking_has_fewer():
    [three], _ = ranked_rankings([ranked([[7, 1], [8], [9]], 1.0, 3.0, 2.0)])
    [two] = pair_rankings(PAIRS[:1], by_prompt=False, needs_gaps=False)
    batch = collate_rankings([three, two], 0, CPU)
    assert len(batch) == 2 and batch.num_responses == 3
    assert batch.padded.responses.tolist() == [[7, 1], [7, 1], [8, 0], [8, 1], [9, 0], [7, 0]]
    assert batch.padded.queries.tolist() == [[0, 5], [3, 4]] * 3
    assert batch.padded.response_mask.sum(1).tolist() == [2, 2, 1, 2, 1, 1], "a response always has a token"
    batch = collate_rankings([three, two], 1000, CPU)
    assert 1000 not in batch.padded.responses[batch.padded.response_mask], "which a model need not embed"
    assert batch.real.tolist() == [[True, True, True], [True, True, False]]
    assert batch.ranks.tolist() == [[2, 0, 1], [-1, -1, -1]]
    assert batch.comparisons.tolist() == [[0, 1, 0], [0, 1, 2], [0, 2, 0], [1, 0, 1]]
    assert batch.gaps.tolist() == [2.0, 1.0, 1.0, 0.0] and batch.best.tolist() == [1, 0]
