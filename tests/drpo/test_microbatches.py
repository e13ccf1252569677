"""Grouping rows by length: what a group may hold, by hand and as properties."""

from __future__ import annotations

import numpy as np
import pytest

from drpo.microbatches import microbatches, same_query_batches, sharing_saves


def test_rows_are_grouped_longest_first_within_the_token_bound():
    lengths = [(2, 1), (6, 2), (3, 3), (2, 2), (5, 3)]
    # by total: row 1 and 4 (8 each), 2 (6), 3 (4), 0 (3); 2 rows * (6 + 3) = 18; 3 would be 27
    assert microbatches(lengths, None, 18) == [[1, 4], [2, 3, 0]]  # 3 rows * (3 + 3) = 18
    assert microbatches(lengths, None, 17) == [[1], [4, 2], [3, 0]]


@pytest.mark.parametrize("max_rows", [None, 1, 3, 7])
@pytest.mark.parametrize("max_tokens", [None, 1, 40, 200])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_row_is_in_one_group_within_both_bounds(max_rows, max_tokens, world_size):
    if max_rows is None and max_tokens is None:
        return
    for seed in range(20):
        draw = np.random.default_rng(seed)
        lengths = [
            (int(q), int(r)) for q, r in draw.integers(1, 30, (world_size * int(draw.integers(1, 14)), 2))
        ]
        groups = microbatches(lengths, max_rows, max_tokens, world_size)
        assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
        assert len(groups) % world_size == 0
        for group in groups:
            width = max(lengths[row][0] for row in group) + max(lengths[row][1] for row in group)
            assert max_rows is None or len(group) <= max_rows
            assert max_tokens is None or len(group) == 1 or len(group) * width <= max_tokens


def test_rows_of_one_length_are_grouped_in_order():
    assert microbatches([(4, 2)] * 5, 2, None) == [[0, 1], [2, 3], [4]]


def test_groups_are_split_for_every_process_to_have_as_many():
    assert microbatches([(4, 2)] * 4, 8, None, world_size=2) == [[0, 1], [2, 3]]
    assert microbatches([(4, 2)] * 6, 2, None, world_size=2) == [[0], [1], [2, 3], [4, 5]]


def test_impossible_divisions_are_refused():
    with pytest.raises(ValueError, match="both None"):
        microbatches([(1, 1)], None, None)
    with pytest.raises(ValueError, match="3 rows do not divide over 2 processes"):
        microbatches([(1, 1)] * 3, 1, None, world_size=2)


def test_rows_with_one_query_come_as_blocks():
    queries = [[1], [2], [1], [3], [2], [1], [4]]
    lengths = [(20, 2), (21, 2), (20, 3), (5, 1), (21, 1), (20, 4), (4, 1)]
    batches = same_query_batches(queries, lengths, 4)
    # by hand: the singles (4 tokens + 1 first), then the pair of query 2, then the three of query 1
    assert batches == [([6, 3], 1), ([1, 4], 2), ([0, 2, 5], 3)]
    wide = same_query_batches([[1], [2], [1], [2]], [(9, 1)] * 4, 4)
    assert wide == [([0, 1, 2, 3], 2)]  # block 0 is row 0 and 1, block 1 their other responses


def test_more_rows_of_a_query_than_may_go_together_come_in_parts():
    """As when two of the prompts of a step are one."""
    assert same_query_batches([[1]] * 5, [(30, 2)] * 5, 8, most_together=2) == [
        ([4], 1),
        ([0, 2, 1, 3], 2),
    ]
    assert same_query_batches([[1]] * 3, [(30, 2)] * 3, 8, most_together=1) == [([0, 1, 2], 1)]


def test_rows_that_cost_less_apart_or_do_not_fit_stay_apart():
    long_responses = [(2, 30), (2, 30), (2, 30)]
    assert not sharing_saves(long_responses, 3)  # (2 + 90)^2 > 3 * 32^2
    assert sharing_saves([(30, 2)] * 3, 3)  # 36^2 < 3 * 32^2
    assert same_query_batches([[1]] * 3, long_responses, 8) == [([0, 1, 2], 1)]
    assert same_query_batches([[1]] * 3, [(30, 2)] * 3, 2) == [([0, 1], 1), ([2], 1)]


def test_every_row_is_in_one_batch():
    draw = np.random.default_rng(0)
    for _ in range(50):
        num_rows = int(draw.integers(1, 30))
        query = [(int(number),) for number in draw.integers(0, 6, num_rows)]
        lengths = [(int(q[0]) + 3, int(r)) for q, r in zip(query, draw.integers(1, 9, num_rows), strict=True)]
        max_rows = int(draw.integers(1, 9))
        batches = same_query_batches(query, lengths, max_rows)
        assert sorted(row for rows, _ in batches for row in rows) == list(range(num_rows))
        for rows, size in batches:
            assert len(rows) <= max_rows and len(rows) % size == 0
            blocks = np.array(rows).reshape(size, -1)
            assert all([query[row] for row in block] == [query[row] for row in blocks[0]] for block in blocks)
