"""Dynamic batching: common batches, and every request gets the scores of its own rows."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from reward_models.serving.batcher import Batcher, Overloaded


def score(rows) -> torch.Tensor:
    return torch.tensor([1000.0 * query[0] + response[-1] for query, response in rows])


@pytest.fixture
def batches():
    return []


@pytest.fixture
def gate():
    """Scoring waits for it, so that requests pile up."""
    return threading.Event()


@pytest.fixture
def batcher(batches, gate):
    def noted(rows):
        batches.append(len(rows))
        assert gate.wait(10)
        if any(query[0] < 0 for query, _ in rows):
            raise ValueError("no such token")
        return score(rows)

    batcher = Batcher(noted, max_rows=8, max_wait=0.2, max_waiting=100)
    yield batcher
    gate.set()
    batcher.close()


def test_ragged_requests_of_32_threads_get_their_own_scores_in_order():
    batcher = Batcher(score, max_rows=16, max_wait=0.001, max_waiting=10_000)

    def client(number: int) -> None:
        draw = random.Random(number)
        for _ in range(20):
            last = [draw.randrange(1000) for _ in range(draw.randrange(1, 12))]
            found = batcher.submit([([number], [7, token]) for token in last]).result(10)
            assert found == [1000.0 * number + token for token in last]

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(client, range(32)))
    batcher.close()


def test_waiting_requests_are_scored_together_up_to_the_size_and_none_is_cut(batcher, batches, gate):
    first = batcher.submit([([0], [i]) for i in range(8)])  # fills a batch, so nothing joins it
    waiting = [batcher.submit([([i], [5]), ([i], [6]), ([i], [7])]) for i in range(1, 6)]
    gate.set()
    assert first.result(10) == [float(i) for i in range(8)]
    for number, future in enumerate(waiting, start=1):
        assert future.result(10) == [1000.0 * number + token for token in (5, 6, 7)]
    assert batches == [8, 9, 6]


def test_a_request_that_fails_fails_no_other_of_its_batch(batcher, gate):
    futures = [batcher.submit([([number], [1])]) for number in (3, -1, 4)]
    gate.set()
    assert futures[0].result(10) == [3001.0] and futures[2].result(10) == [4001.0]
    with pytest.raises(ValueError, match="no such token"):
        futures[1].result(10)
    assert batcher.submit([([5], [1])]).result(10) == [5001.0]  # the thread has gone on


def test_rows_beyond_the_limit_are_refused_and_those_that_wait_are_not_lost(batcher, gate):
    first = batcher.submit([([0], [0])] * 8)
    while batcher._num_waiting:  # until the thread has taken it
        threading.Event().wait(0.01)
    waiting = batcher.submit([([1], [1])] * 60)
    with pytest.raises(Overloaded, match="60 rows are waiting already, of 100"):
        batcher.submit([([2], [2])] * 41)
    gate.set()
    assert first.result(10) == [0.0] * 8 and waiting.result(10) == [1001.0] * 60


def test_closing_scores_what_waits_and_takes_no_more(batches, gate):
    batcher = Batcher(score, max_rows=2, max_wait=0, max_waiting=100)
    futures = [batcher.submit([([number], [0])]) for number in range(20)]
    batcher.close()
    assert [future.result(0) for future in futures] == [[1000.0 * number] for number in range(20)]
    assert not batcher.alive
    with pytest.raises(Overloaded, match="shutting down"):
        batcher.submit([([0], [0])])


def test_a_request_that_nobody_waits_for_any_more_stops_no_other(batcher, batches, gate):
    first = batcher.submit([([0], [0])] * 8)
    while batcher._num_waiting:  # until the thread has taken it
        threading.Event().wait(0.01)
    given_up, wanted = batcher.submit([([1], [1])]), batcher.submit([([2], [2])])
    assert given_up.cancel()
    gate.set()
    assert first.result(10) == [0.0] * 8 and wanted.result(10) == [2002.0]
    assert batches[1] == 1 and batcher.submit([([3], [3])]).result(10) == [3003.0]
