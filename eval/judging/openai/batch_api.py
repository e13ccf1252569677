"""The judge through the Batch API: cheaper, done within a day, on the same store as the live one.

A request's custom_id is its key in the store. A batch is entered in the store before it is submitted, and its metadata
contains our name for it, so a killed run finds its batches again. Finished rows are merged even if others failed;
missing and unreadable ones are submitted again, up to batch.max_submissions times.
"""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from openai import AsyncOpenAI
from openai.types import Batch, FileObject

from drpo.config import Section, setting
from eval.judging.judge import JudgeStopped
from eval.judging.matchup import Question
from eval.judging.openai.answer_body import decoded, text_or_none
from eval.judging.openai.batch_replies import batch_called, reasons_of, rows_in, status_of, with_id
from eval.judging.openai.budget import Budget, BudgetReached
from eval.judging.openai.request import JudgeSetup, Request
from eval.judging.openai.retry import (
    Failure,
    NotAnAnswer,
    RetryConfig,
    classify,
    classify_status,
    unclear_text,
)
from eval.judging.openai.store import Call, Reservation, Store
from eval.judging.verdict import Verdict
from eval.progress import Say

MAX_BYTES = 190_000_000
"A little less than the API's limit of 200 MB for a file."
ENDPOINT = "/v1/chat/completions"
METADATA_KEY = "drpo_batch"
ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass(frozen=True)
class BatchAPIConfig(Section):
    """How batches are submitted (section `batch`, for judge.backend=batch)."""

    poll_seconds: float = setting(60.0, gt=0)
    """Time between two looks at a batch."""
    max_requests: int = setting(50_000, ge=1, le=50_000)
    """Requests of one batch; the API takes 50000 at most, an account's queue may take fewer."""
    max_submissions: int = setting(3, ge=1)
    """How often a request that came back without an answer is submitted, all in all."""


@dataclass(eq=False)
class BatchJudge:
    """A judge that asks a model through the Batch API."""

    client: AsyncOpenAI
    setup: JudgeSetup
    store: Store
    "Answers, which are reused, and open batches."
    budget: Budget
    config: BatchAPIConfig
    retry: RetryConfig
    say: Say

    def __post_init__(self) -> None:
        self._failures: dict[str, list[Call]] = defaultdict(list)
        self._unanswerable: set[str] = set()
        self._rng = random.Random()
        self._stopping = asyncio.Event()
        self._reason = ""

    def stop(self, reason: str) -> None:
        self._reason = reason
        self._stopping.set()

    async def verdicts(self, questions: Sequence[Question]) -> AsyncIterator[Verdict]:
        stopped = None
        try:
            await self._merge_open()
            while requests := self._next_requests(questions):
                for chunk in _chunks(requests, self.config.max_requests):
                    await self._submit(chunk)
                await self._merge_open()
        except JudgeStopped as error:
            stopped = error
        for question in questions:
            request, calls = self.setup.unanswered(question, self.store)
            failures = [] if request is None else self._failures[request.key][-1:]
            if request is None or failures:
                yield self.setup.verdict(question, [*calls, *failures])
        if stopped is not None:
            raise stopped

    def _next_requests(self, questions: Sequence[Question]) -> list[Request]:
        """Return the requests to submit now, each once."""
        requests = (self.setup.unanswered(question, self.store)[0] for question in questions)
        unique = {request.key: request for request in requests if request is not None}
        max_failures = self.config.max_submissions
        given_up = self._unanswerable | {key for key in unique if len(self._failures[key]) >= max_failures}
        return [request for key, request in unique.items() if key not in given_up]

    # --- submitting -------------------------------------------------------------------------------------

    async def _submit(self, requests: Sequence[Request]) -> None:
        name = uuid.uuid4().hex
        try:
            self.budget.reserve_batch([(r.key, self.setup.max_usd(r)) for r in requests], name)
        except BudgetReached as error:
            raise JudgeStopped(str(error)) from None
        self.store.add_batch(name, [(r.key, r.sample, r.body) for r in requests])
        content = (f"{name}.jsonl", b"".join(map(_line, requests)))
        file = await self._ask(lambda: self.client.files.create(file=content, purpose="batch"), FileObject)
        batch_id = await self._create(name, file.id)
        self.store.update_batch(name, batch_id, "open")
        self.say(f"submitted batch {batch_id} of {len(requests)} requests")

    async def _create(self, name: str, file_id: str) -> str:
        """Submit a batch; after an unclear failure, first check that it does not exist, since each one is paid for."""
        submitted = False

        async def create() -> Any:
            nonlocal submitted
            if submitted and (listed := await self._listed(name)) is not None:
                return listed
            submitted = True
            return await self.client.batches.create(
                input_file_id=file_id,
                endpoint=ENDPOINT,
                completion_window="24h",
                metadata={METADATA_KEY: name},
            )

        return (await self._ask(create, Batch)).id

    async def _listed(self, name: str) -> Batch | None:
        """Return the batch with this name in its metadata, None if there is none."""
        # Raw: the client cannot page through HTML.
        raw = await self.client.batches.with_raw_response.list(limit=100)
        return batch_called(name, METADATA_KEY, decoded(raw.http_response.text))

    async def _rows(self, file_id: str, num_expected: int) -> list[dict[str, Any]]:
        """Download the rows of a file. Raises NotAnAnswer as `rows_in` does."""
        return rows_in((await self.client.files.content(file_id)).content, file_id, num_expected)

    async def _ask(self, request: Callable[[], Any], kind: type[FileObject | Batch] | None = None) -> Any:
        """Send a request, retried while that may help, for a reply of a `kind`; raise JudgeStopped without one."""
        for attempt in range(1, self.retry.max_attempts + 1):
            try:
                reply = await request()
                return reply if kind is None else with_id(reply, kind)
            except Exception as error:
                failure = classify(error)
                if failure.action != "retry" or attempt == self.retry.max_attempts:
                    raise JudgeStopped(f"the Batch API: {failure.detail}") from None
                delay = failure.retry_after
                if (
                    delay is None
                ):  # never near 0: a batch that was made after all must be listed when `_create` looks
                    delay = min(self.retry.max_delay, self.retry.base_delay * 2**attempt)
                await self._sleep(delay + self._rng.uniform(0, self.retry.base_delay))

    async def _sleep(self, seconds: float) -> None:
        """Sleep. Raises JudgeStopped when the run is asked to stop; submitted batches continue at the API."""
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except asyncio.TimeoutError:
            return
        raise JudgeStopped(f"{self._reason}; submitted batches go on, and a rerun merges them")

    # --- merging ----------------------------------------------------------------------------------------

    async def _merge_open(self) -> None:
        """Wait for every submitted batch, of this run or an earlier one, and store its answers."""
        for name, batch_id, rows in self.store.open_batches():
            if batch_id is None:
                listed = await self._ask(lambda name=name: self._listed(name))
                batch_id = None if listed is None else listed.id
            if batch_id is None:  # killed before it was submitted, so it costs nothing
                for reservation in self.store.open_requests_of(name).values():
                    await self.budget.settle(reservation, 0.0, "never submitted")
                self.store.update_batch(name, None, "never submitted")
                continue
            self.store.update_batch(name, batch_id, "open")
            batch = await self._wait_for(batch_id)
            requests = {key: Request(key, sample, body) for key, sample, body in rows}
            try:
                await self._merge(name, batch, requests)
            finally:
                merged = not self.store.open_requests_of(name)
                self.store.update_batch(name, batch_id, batch.status if merged else "open")
            if batch.status == "failed":  # not accepted: its file, the account's queue or quota
                raise JudgeStopped(f"batch {batch.id} was not accepted: {reasons_of(batch)}")

    async def _wait_for(self, batch_id: str) -> Batch:
        while True:
            batch = await self._ask(lambda: self.client.batches.retrieve(batch_id), Batch)
            if batch.status in ENDED:
                return batch
            await self._sleep(self.config.poll_seconds)

    async def _merge(self, name: str, batch: Batch, requests: dict[str, Request]) -> None:
        open_requests = self.store.open_requests_of(name)
        stop: Failure | None = None
        completed = getattr(batch.request_counts, "completed", None)
        for file_id, num_expected in ((batch.output_file_id, completed), (batch.error_file_id, 0)):
            if file_id is None:  # a batch of failures alone has no output file
                continue
            rows = await self._ask(lambda of=file_id, expected=num_expected: self._rows(of, expected))
            for row in rows:
                if (key := row["custom_id"]) in open_requests:
                    failure = await self._settle(requests[key], row, open_requests.pop(key))
                    if failure is not None and failure.action == "stop":
                        stop = failure
        for key, reservation in open_requests.items():  # expired or cancelled before their turn
            detail = f"no answer in a batch that ended as {batch.status}"
            await self.budget.settle(reservation, 0.0, detail)
            self._note_failure(requests[key], detail)
        if stop is not None:
            raise JudgeStopped(stop.detail, stop.param)

    async def _settle(
        self, request: Request, row: dict[str, Any], reservation: Reservation
    ) -> Failure | None:
        """Book one row of a batch, and return its failure, if any."""
        response = row["response"] if isinstance(row.get("response"), dict) else {}
        body, status = response.get("body"), status_of(row, response)
        if 200 <= status < 300:
            try:
                request_id = text_or_none(response.get("request_id"))
                call = self.setup.answered(request, body, "batch", request_id=request_id)
            except NotAnAnswer as error:
                failure = classify(error)
            else:
                await self.budget.settle(reservation, call.cost, "answered", call)
                return None
        else:
            failure = classify_status(status, row.get("error") or body, {})
        if failure.unclear and not self.store.answered_by(request.body["model"]):
            failure = replace(failure, action="stop", detail=unclear_text(failure))
        call = None
        if failure.action == "refused":
            call = self.setup.record(request, "batch", "refused", detail=failure.detail)
        await self.budget.settle(reservation, None if failure.may_be_paid else 0.0, failure.detail, call)
        if failure.action in ("retry", "give_up"):
            self._note_failure(request, failure.detail)
        if failure.action == "give_up":
            self._unanswerable.add(request.key)
        return failure

    def _note_failure(self, request: Request, detail: str) -> None:
        call = self.setup.record(request, "batch", "failed", detail=detail)
        self.store.add_call(call)
        self._failures[request.key].append(call)


def _line(request: Request) -> bytes:
    row = {"custom_id": request.key, "method": "POST", "url": ENDPOINT, "body": request.body}
    return json.dumps(row).encode() + b"\n"


def _chunks(requests: Sequence[Request], max_requests: int) -> Iterator[list[Request]]:
    """Split requests, in order, into batches within the API's limits on rows and bytes."""
    chunk: list[Request] = []
    size = 0
    for request in requests:
        length = len(_line(request))
        if chunk and (len(chunk) == max_requests or size + length > MAX_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(request)
        size += length
    if chunk:
        yield chunk
