"""Dynamic batching: one thread owns the model, and scores the rows of waiting requests together."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


class Overloaded(Exception):
    """More rows are waiting than a batcher takes."""


@dataclass(frozen=True)
class _Job:
    rows: Sequence[Any]
    scores: Future[list[Any]] = field(default_factory=Future)


class Batcher:
    """Scores the rows of many requests in common batches; each request gets the scores of its own rows, in order.

    A batch is begun by the first request that waits, and takes further ones until it has `max_rows` rows or
    `max_wait` seconds have passed. A request is never cut.
    """

    def __init__(
        self,
        score: Callable[[Sequence[Any]], Tensor],
        max_rows: int,
        max_wait: float,
        max_waiting: int,
    ) -> None:
        """Start the thread.

        Args:
            score: returns the scores (B, ...) of B rows, whatever these are; called from the thread alone.
            max_rows: rows of a batch, above which no further request joins it.
            max_wait: seconds that a batch waits for further requests.
            max_waiting: rows that may wait.
        """
        self._score, self._max_rows, self._max_wait, self._max_waiting = (
            score,
            max_rows,
            max_wait,
            max_waiting,
        )
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_waiting = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="scoring", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are still scored."""
        return self._thread.is_alive() and not self._closed

    def submit(self, rows: Sequence[Any]) -> Future[list[Any]]:
        """Queue rows; their scores come in the order of `rows`. Raises Overloaded when too many are waiting."""
        job = _Job(rows)
        with self._lock:
            if self._closed:
                raise Overloaded("the server is shutting down")
            if self._num_waiting and self._num_waiting + len(rows) > self._max_waiting:
                raise Overloaded(f"{self._num_waiting} rows are waiting already, of {self._max_waiting}")
            self._num_waiting += len(rows)
            self._jobs.put(job)
        return job.scores

    def close(self) -> None:
        """Score what is waiting, then end the thread."""
        with self._lock:
            self._closed = True
            self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        ends = False
        while not ends:
            batch, ends = self._next_batch()
            with self._lock:
                self._num_waiting -= sum(len(job.rows) for job in batch)
            if batch:
                self._score_wanted(batch)

    def _next_batch(self) -> tuple[list[_Job], bool]:
        """Return the requests of a batch, and whether it is the last."""
        job = self._jobs.get()
        if job is None:
            return [], True
        batch, num_rows, deadline = [job], len(job.rows), time.monotonic() + self._max_wait
        while num_rows < self._max_rows:
            try:
                job = self._jobs.get(timeout=max(deadline - time.monotonic(), 0))
            except queue.Empty:
                break
            if job is None:
                return batch, True
            batch.append(job)
            num_rows += len(job.rows)
        return batch, False

    def _score_wanted(self, batch: Sequence[_Job]) -> None:
        """Score the requests that somebody still waits for."""
        wanted = [job for job in batch if job.scores.set_running_or_notify_cancel()]
        if wanted:
            self._score_batch(wanted)

    def _score_batch(self, batch: Sequence[_Job]) -> None:
        """Give every request its scores; if the batch fails, score its requests alone, so that one fails no other."""
        try:
            scores = self._score([row for job in batch for row in job.rows]).tolist()
        except Exception as error:  # whatever the model raises is for who asked, and the thread goes on
            if len(batch) == 1:
                batch[0].scores.set_exception(error)
            else:
                for job in batch:
                    self._score_batch([job])
            return
        end = 0
        for job in batch:
            start, end = end, end + len(job.rows)
            job.scores.set_result(scores[start:end])
