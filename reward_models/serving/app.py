"""The HTTP interface of a reward model: POST /score, GET /info, GET /health.

Bodies and answers are JSON. No request names a file, and errors do not repeat prompts or responses.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from reward_models.serving.batcher import Batcher, Overloaded
from reward_models.serving.rows import BadRequest
from reward_models.serving.served import ServedModel

DROPPED_BYTES = 1 << 24


class RewardServer:
    """Reward models behind HTTP; `app` is the ASGI application."""

    def __init__(
        self,
        served: ServedModel,
        token: str | None = None,
        max_wait: float = 0.005,
        max_waiting: int = 8192,
        max_requests: int = 256,
    ) -> None:
        """Start the thread that scores.

        Args:
            served: the model or ensemble, and the largest requests.
            token: bearer token that /score and /info ask for; None for none.
            max_wait: seconds that a batch waits for further requests.
            max_waiting: rows that may wait to be scored.
            max_requests: requests that may be open, so that their bodies together are bounded.
        """
        self._served, self._token, self.info = served, token, served.info
        self._num_open, self._max_requests = 0, max_requests
        self._batcher = Batcher(served.score, served.batch_size, max_wait, max_waiting)
        self._reader = ThreadPoolExecutor(1)  # tokenizers are not made for several threads
        self.app = FastAPI(
            lifespan=self._closing, docs_url=None, redoc_url=None, openapi_url=None, title="reward model"
        )
        self.app.add_exception_handler(BadRequest, _refused)
        self.app.add_api_route("/score", self._score, methods=["POST"])
        self.app.add_api_route("/info", self._answer_info, methods=["GET"])
        self.app.add_api_route("/health", self._health, methods=["GET"])

    @asynccontextmanager
    async def _closing(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self._batcher.close)
        self._reader.shutdown()

    async def _score(self, request: Request) -> JSONResponse:
        self._check_token(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise BadRequest(415, "the body must be application/json")
        if self._num_open >= self._max_requests:
            await self._body(request, keep=False)  # to its end, so that its client reads why
            raise BadRequest(
                503, f"as many requests are open as this server takes at a time, {self._max_requests}"
            )
        self._num_open += 1
        try:
            return await self._scored(request)
        finally:
            self._num_open -= 1

    async def _scored(self, request: Request) -> JSONResponse:
        body = await self._body(request)
        loop = asyncio.get_running_loop()
        rows = await loop.run_in_executor(self._reader, self._served.read, body)
        try:
            waiting = self._batcher.submit(rows)
        except Overloaded as error:
            raise BadRequest(503, str(error)) from None
        try:
            columns = list(zip(*await asyncio.wrap_future(waiting), strict=True))
        except Exception as error:  # of the model, not of the request
            raise BadRequest(500, f"the model failed: {type(error).__name__}: {error}") from error
        if not all(math.isfinite(number) for column in columns for number in column):
            raise BadRequest(500, "the model gives scores that are not finite")
        answer = {"model": self.info["model"], **dict(zip(("scores", "spread"), columns, strict=False))}
        return JSONResponse(answer)

    async def _answer_info(self, request: Request) -> JSONResponse:
        self._check_token(request)
        return JSONResponse(self.info)

    async def _health(self) -> JSONResponse:
        if not self._batcher.alive:
            raise BadRequest(503, "the thread that scores has ended")
        return JSONResponse({"status": "ok"})

    def _check_token(self, request: Request) -> None:
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # In constant time, so that answers do not show how much of a guess is right.
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.encode(), self._token.encode()):
            raise BadRequest(401, "the bearer token is missing or wrong")

    async def _body(self, request: Request, keep: bool = True) -> bytes:
        """Read a body. One that is too large is read on and dropped, within bounds, so that its client reads why.

        Without `keep` nothing of it is held.
        """
        body, size, limit = bytearray(), 0, self._served.limits.max_bytes
        try:
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    body += part if keep else b""
                elif size > limit + DROPPED_BYTES:
                    break
        except ClientDisconnect:
            raise BadRequest(400, "the client left before its request was whole") from None
        if size > limit:
            raise BadRequest(413, f"the body has more than the {limit} bytes that this server takes")
        return bytes(body)


async def _refused(request: Request, error: BadRequest) -> JSONResponse:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse({"detail": str(error)}, error.status, headers)
