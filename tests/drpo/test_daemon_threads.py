"""Calls in threads: order, the first failure, and a process that is to stop."""

from __future__ import annotations

import threading

import pytest

from drpo.daemon_threads import call_each
from drpo.run.stopped import Interrupted


@pytest.mark.parametrize("num_threads", [1, 3, 20])
def test_results_keep_the_order_of_the_items(num_threads):
    first_done = threading.Event()

    def double(item: int) -> int:
        if item == 1 and num_threads > 1:
            assert first_done.wait(30), "several calls are under way at a time"
        if item == 0:
            first_done.set()
        return 2 * item

    assert call_each(double, [1, 0, *range(2, 12)], num_threads, threading.Event())[:3] == [2, 0, 4]
    assert call_each(double, [], num_threads, threading.Event()) == []


def test_the_first_failure_is_raised_and_begins_nothing_more():
    begun = []

    def fail(item: int) -> None:
        begun.append(item)
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        call_each(fail, range(5), 1, threading.Event())
    assert begun == [0]


def test_a_failure_does_not_wait_for_calls_that_hang():
    never = threading.Event()

    def call(item: int) -> None:
        if item == 0:
            never.wait(600)
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        call_each(call, [0, 1], 2, threading.Event())
    never.set()


def test_a_stop_leaves_calls_that_hang_to_daemon_threads():
    never, stop, daemons = threading.Event(), threading.Event(), []

    def hang(item: int) -> None:
        daemons.append(threading.current_thread().daemon)
        stop.set()
        never.wait(600)

    with pytest.raises(Interrupted):
        call_each(hang, range(3), 1, stop)
    assert daemons == [True]
    never.set()


def test_answers_that_are_there_are_not_lost_to_a_stop():
    stop = threading.Event()
    assert call_each(lambda item: stop.set() or item, [7], 1, stop) == [7]
