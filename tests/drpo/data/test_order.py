"""The endless sequence of shuffled passes over the data."""

from __future__ import annotations

from collections import Counter

import pytest

from drpo.data.order import item_at

ITEMS = [f"item {i}" for i in range(10)]


def drawn(indices, seed: int = 0, items=ITEMS) -> list[str]:
    return [item_at(items, index, seed) for index in indices]


@pytest.mark.parametrize("sweep", [0, 1, 7])
def test_every_pass_has_every_item_once(sweep):
    assert Counter(drawn(range(sweep * 10, sweep * 10 + 10))) == Counter(ITEMS)


def test_passes_and_seeds_differ_in_order_and_are_shuffled():
    orders = [drawn(range(10)), drawn(range(10, 20)), drawn(range(10), seed=1), ITEMS]
    assert len({tuple(order) for order in orders}) == 4


def test_an_index_depends_on_nothing_that_was_drawn_before():
    forwards = drawn(range(35))
    backwards = drawn(reversed(range(35)))[::-1]
    interleaved = {}
    for index in [*range(0, 35, 2), *range(1, 35, 2)]:
        drawn([index], seed=3)
        interleaved[index] = item_at(ITEMS, index, 0)
    assert forwards == backwards == [interleaved[index] for index in range(35)]


def test_shares_of_processes_make_up_the_whole_batch():
    whole = drawn(range(24, 32))
    assert drawn(range(24, 28)) + drawn(range(28, 32)) == whole


def test_first_places_are_uniform():
    """1000 seeds: each of 5 items is first 200 times on average; 5 standard deviations are 63."""
    counts = Counter(item_at(ITEMS[:5], 0, seed) for seed in range(1000))
    assert set(counts) == set(ITEMS[:5])
    assert all(abs(count - 200) < 63 for count in counts.values())


def test_one_item_is_always_that_item():
    assert drawn(range(3), items=ITEMS[:1]) == ITEMS[:1] * 3
