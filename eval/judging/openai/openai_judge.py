"""A judge behind an OpenAI-compatible API, with one request per call and many concurrent calls.

The client's own retries are off: it retries an exhausted quota, ignores long Retry-After headers and does not
coordinate workers. Retries are those of `retry`, the pace of `rate_limit`, the caps of `budget`, and every answer is
in the store before the next question is taken.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

from openai import AsyncOpenAI

from drpo.config import ConfigError
from eval.judging.judge import JudgeStopped
from eval.judging.matchup import Question
from eval.judging.openai.answer_body import decoded
from eval.judging.openai.budget import Budget, BudgetReached
from eval.judging.openai.rate_limit import RateLimiter
from eval.judging.openai.request import JudgeSetup, Request, stored_verdicts
from eval.judging.openai.retry import RetryConfig, classify, delay_before_retry, unclear_text
from eval.judging.openai.settings import OpenAISettings
from eval.judging.openai.store import Call, Reservation, Store
from eval.judging.verdict import Verdict

Result = TypeVar("Result")


def make_client(config: OpenAISettings, retry: RetryConfig) -> AsyncOpenAI:
    """Make the client of the API. Raises ConfigError when the key is not in the environment.

    OpenAI's key is sent to OpenAI only: another server gets the one that the recipe names, or none.
    """
    name = config.api_key_env or (None if config.base_url else "OPENAI_API_KEY")
    key = "none" if name is None else os.environ.get(name, "").strip()
    if not key:
        raise ConfigError(f"the environment variable {name} with the API key is not set (judge.api_key_env)")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"the environment variable {name} holds no API key: letters or signs that no key has"
        )
    return AsyncOpenAI(api_key=key, base_url=config.url, max_retries=0, timeout=retry.timeout)


@dataclass(eq=False)
class OpenAIJudge:
    """A judge that asks a model, one request per call."""

    client: AsyncOpenAI
    setup: JudgeSetup
    store: Store
    "Answers, which are reused."
    budget: Budget
    limiter: RateLimiter
    retry: RetryConfig
    concurrency: int
    "Questions asked at once."

    def __post_init__(self) -> None:
        self._rng = random.Random()
        self._tasks: dict[str, asyncio.Task[Call]] = {}
        self._failures_in_a_row = 0
        self._stopped: JudgeStopped | None = None
        self._stop_event = asyncio.Event()

    def stop(self, reason: str) -> None:
        self._halt(reason)

    def _halt(self, reason: str, param: str | None = None) -> JudgeStopped:
        if self._stopped is None:
            self._stopped = JudgeStopped(reason, param)
            self._stop_event.set()
        return self._stopped

    async def verdicts(self, questions: Sequence[Question]) -> AsyncIterator[Verdict]:
        queue = iter(questions)
        answered_questions: set[Question] = set()
        results: asyncio.Queue[tuple[Question, Verdict] | None] = asyncio.Queue()

        async def work() -> None:
            try:
                for question in queue:
                    results.put_nowait((question, await self._ask(question)))
                    if self._stopped is not None:
                        return
            except BaseException as error:
                self._halt(f"a worker ended with {error!r}")
                raise
            finally:
                results.put_nowait(None)

        workers = [asyncio.create_task(work()) for _ in range(self.concurrency)]
        try:
            num_running = len(workers)
            while num_running:
                result = await results.get()
                if result is None:
                    num_running -= 1
                else:
                    answered_questions.add(result[0])
                    yield result[1]
            for error in await asyncio.gather(*workers, return_exceptions=True):
                if error is not None and not isinstance(error, JudgeStopped):
                    raise error
            if self._stopped is not None:
                unanswered = [question for question in questions if question not in answered_questions]
                for verdict in stored_verdicts(self.setup, unanswered, self.store):  # needs no request
                    yield verdict
                raise self._stopped
        finally:
            tasks = [*workers, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, question: Question) -> Verdict:
        """Ask until an answer can be read, or the number of retries is used up."""
        while True:
            request, calls = self.setup.unanswered(question, self.store)
            if request is None:
                return self.setup.verdict(question, calls)
            call = await self.call(request)
            if call.status == "failed":
                return self.setup.verdict(question, [*calls, call])

    async def call(self, request: Request) -> Call:
        """Return the stored answer to a request, the one awaited by another worker, or a new one."""
        stored = self.store.answer(request.key)
        if stored is not None:
            return stored
        task = self._tasks.get(request.key)
        if task is None:
            task = asyncio.create_task(self._send_until_answered(request))
            self._tasks[request.key] = task
            task.add_done_callback(lambda _: self._tasks.pop(request.key, None))
        return await task

    async def _send_until_answered(self, request: Request) -> Call:
        """Send a request until it has an answer or has failed. Raises JudgeStopped when the run has to stop."""
        first_sent = None
        for attempt in count(1):
            reservation = await self._reserve(request)
            sent = time.monotonic()
            first_sent = first_sent or sent
            try:
                raw = await asyncio.wait_for(
                    self.client.chat.completions.with_raw_response.create(**request.body),
                    self.retry.timeout,
                )
                values = {"latency": time.monotonic() - sent, "request_id": raw.headers.get("x-request-id")}
                call = self.setup.answered(request, decoded(raw.text), "live", num_attempts=attempt, **values)
            except Exception as error:  # after a cancellation the reservation stays open: it may be paid
                failure = classify(error)
                is_refusal = failure.action == "refused"
                values = {"detail": failure.detail, "num_attempts": attempt}
                call = self.setup.record(request, "live", "refused" if is_refusal else "failed", **values)
                paid = None if failure.may_be_paid else 0.0
                await self.budget.settle(reservation, paid, failure.detail, call if is_refusal else None)
                if is_refusal:
                    return call
                if failure.action == "stop":
                    raise self._halt(failure.detail, failure.param) from None
                if failure.unclear and not self.store.answered_by(request.body["model"]):
                    raise self._halt(unclear_text(failure)) from None
                if failure.action == "give_up" or attempt == self.retry.max_attempts:
                    return self._fail(call)
                delay = delay_before_retry(self.retry, attempt, failure.retry_after, self._rng)
                if time.monotonic() - first_sent + delay > self.retry.max_elapsed:
                    if failure.cause == "day":  # the same for all questions
                        raise self._halt(failure.detail) from None
                    return self._fail(call)
                if failure.retry_after is not None:
                    self.limiter.pause(failure.retry_after)
                await self._unless_stopped(asyncio.sleep(delay))
            else:
                await self.budget.settle(reservation, call.cost, "answered", call)
                self._failures_in_a_row = 0
                return call

    async def _reserve(self, request: Request) -> Reservation:
        """Wait for room in the budget, then for the pace."""
        reserving = self.budget.reserve(request.key, self.setup.max_usd(request))
        try:
            reservation = await self._unless_stopped(reserving)
        except BudgetReached as error:
            raise self._halt(str(error)) from None
        try:
            await self._unless_stopped(self.limiter.wait())
        except BaseException:
            await self.budget.withdraw(reservation)
            raise
        return reservation

    def _fail(self, call: Call) -> Call:
        """Store a failed call; stop the run after too many of them in a row."""
        self.store.add_call(call)
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self.retry.max_failures_in_a_row:
            self._halt(f"{self._failures_in_a_row} questions in a row got no answer: {call.detail}")
        return call

    async def _unless_stopped(self, waiting: Coroutine[Any, Any, Result]) -> Result:
        """Wait for a coroutine. Raises JudgeStopped when the run is stopped first."""
        task = asyncio.ensure_future(waiting)
        stop = asyncio.ensure_future(self._stop_event.wait())
        try:
            if self._stopped is None:
                await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise self._stopped
        finally:
            stop.cancel()
            task.cancel()
