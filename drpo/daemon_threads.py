"""Calls that wait for a server, in threads that a process can leave behind when it is to stop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any

from drpo.run.stopped import Interrupted

POLL = 0.1
"Seconds between two looks at whether the process is to stop."


def start_calls(
    function: Callable[[Any], Any], items: Sequence[Any], num_threads: int, stop: threading.Event
) -> list[Future]:
    """Start to call the function on every item, in their order; none is begun after a failure, or once `stop` is set.

    A thread of a ThreadPoolExecutor would keep the process alive for as long as it waits on a socket.
    """
    futures: list[Future] = [Future() for _ in items]
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for pair in zip(futures, items, strict=True):
        waiting.put(pair)
    failed = threading.Event()

    def work() -> None:
        while not (failed.is_set() or stop.is_set()):
            try:
                future, item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                future.set_result(function(item))
            except BaseException as error:
                failed.set()
                future.set_exception(error)

    for number in range(min(num_threads, len(items))):
        threading.Thread(target=work, name=f"call {number}", daemon=True).start()
    return futures


def results(futures: Sequence[Future], stop: threading.Event) -> list[Any]:
    """Return the results of calls, in their order; raise the first failure, or Interrupted once `stop` is set."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=POLL, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        if pending and stop.is_set():
            raise Interrupted("the process is to stop, and a server has not answered yet")
    return [future.result() for future in futures]


def call_each(
    function: Callable[[Any], Any], items: Sequence[Any], num_threads: int, stop: threading.Event
) -> list[Any]:
    """Return the `results` of `start_calls`."""
    return results(start_calls(function, items, num_threads, stop), stop)
