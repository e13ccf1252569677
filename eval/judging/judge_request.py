"""One call to a judge model: the body that is sent, the key that it is stored under, and the record of its answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from eval.judging.comparison import Question
from eval.judging.injection import suspicions
from eval.judging.judge import JudgeConfig
from eval.judging.judge_prompts import JudgePrompt, messages_for, response_format
from eval.judging.prices import Price, Tokens, prompt_tokens_about, prompt_tokens_at_most
from eval.judging.retry import NotAnAnswer
from eval.judging.store import Call, Store, call_key, now
from eval.judging.verdict import Verdict, verdict_on, winner_of
from eval.judging.verdict_parser import Answer, Form, Reading, read_answer


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent for a question."""

    key: str
    sample: int
    body: dict[str, Any]
    prompt_tokens_at_most: int
    prompt_tokens_about: float


@dataclass(frozen=True)
class Asking:
    """Everything about the asking that all calls of a run share."""

    config: JudgeConfig
    prompt: JudgePrompt
    ties: bool
    form: Form
    price: Price | None

    def request(self, question: Question, sample: int) -> Request:
        """The request of a question, asked for the first time or (sample > 0) again."""
        config = self.config
        body: dict[str, Any] = {
            "model": config.model,
            "messages": messages_for(self.prompt, question, self.form, self.ties, sample),
            config.output_limit: config.max_output_tokens,
        }
        if config.temperature is not None:
            body["temperature"] = config.temperature
        if config.reasoning_effort is not None:
            body["reasoning_effort"] = config.reasoning_effort
        if self.form == "json":
            body["response_format"] = response_format(self.ties)
        key = call_key({"url": config.url.rstrip("/"), "body": body, "sample": sample})
        return self.restored(key, sample, body)

    def restored(self, key: str, sample: int, body: dict[str, Any]) -> Request:
        """A request that was made before, from its parts."""
        texts = [message["content"] for message in body["messages"]]
        if "response_format" in body:
            texts.append(json.dumps(body["response_format"]))
        return Request(key, sample, body, prompt_tokens_at_most(texts), prompt_tokens_about(texts))

    def most(self, request: Request) -> float:
        """Dollars that one sending of a request cannot exceed; 0 without a price."""
        if self.price is None:
            return 0.0
        return self.price.at_most(request.prompt_tokens_at_most, self.config.max_output_tokens)

    def read(self, call: Call) -> Reading:
        """What a call's answer says, by today's parser."""
        if call.status == "failed" or (call.text is None and call.status == "refused"):
            return Reading(call.status, None, call.detail)
        if call.text is None and call.finish_reason is None:  # no choices
            return Reading("malformed", None, call.detail)
        answer = Answer(call.text, call.refusal, call.finish_reason)
        return read_answer(answer, self.form, self.prompt.label, self.prompt.noun, self.ties)

    def unanswered(self, question: Question, store: Store) -> tuple[Request | None, list[Call]]:
        """The request to send next for a question, None if it is settled, and the answers that are stored."""
        calls: list[Call] = []
        for sample in range(1 + self.config.max_reasks):
            request = self.request(question, sample)
            call = store.answer(request.key)
            if call is None:
                return request, calls
            calls.append(call)
            if self.read(call).status != "malformed":
                break
        return None, calls

    def verdict(self, question: Question, calls: list[Call]) -> Verdict:
        """The verdict on a question by the last of its calls."""
        reading = self.read(calls[-1])
        comparison = question.comparison
        return verdict_on(
            question,
            reading.status,
            None if reading.slot is None else winner_of(reading.slot, question.order),
            reading.detail,
            (suspicions(comparison.response_a), suspicions(comparison.response_b)),
            keys=tuple(call.key for call in calls),
        )

    # --- records ----------------------------------------------------------------------------------------

    def answered(
        self,
        request: Request,
        payload: Any,
        backend: str,
        num_attempts: int,
        latency: float | None,
        request_id: str | None,
    ) -> Call:
        """The record of an answer: the JSON of a chat completion.

        Raises NotAnAnswer for JSON that is not a chat completion (some servers send errors with status 200).
        """
        if not isinstance(payload, Mapping) or not isinstance(payload.get("choices"), list):
            raise NotAnAnswer(json.dumps(payload)[:200])
        choice = payload["choices"][0] if payload["choices"] else {}
        message = choice.get("message") or {}
        call = self._record(
            request,
            backend,
            text=_clean(message.get("content")),
            refusal=_clean(message.get("refusal")),
            finish_reason=choice.get("finish_reason") or ("stop" if choice else None),
            model_returned=payload.get("model"),
            fingerprint=payload.get("system_fingerprint"),
            request_id=request_id,
            num_attempts=num_attempts,
            latency=latency,
            detail="" if choice else "an answer without choices",
            status="ok" if choice else "malformed",
            **self._usage(payload.get("usage"), request.body["model"]),
        )
        reading = self.read(call)
        return replace(call, status=reading.status, slot=reading.slot, detail=reading.detail)

    def paid(self, request: Request, call: Call) -> float:
        """Dollars to book for an answered request: its cost, or its bound where the server did not count."""
        return self.most(request) if call.cost is None else call.cost

    def unanswerable(
        self, request: Request, backend: str, status: str, detail: str, num_attempts: int
    ) -> Call:
        """The record of a call without an answer: failed, or refused before any model saw it."""
        return self._record(request, backend, status=status, detail=detail, num_attempts=num_attempts)

    def _record(self, request: Request, backend: str, **values: Any) -> Call:
        empty = dict.fromkeys(Call.__dataclass_fields__)
        known = {
            "key": request.key,
            "model": request.body["model"],
            "sample": request.sample,
            "backend": backend,
            "time": now(),
            "request": json.dumps(request.body, ensure_ascii=False),
        }
        return Call(**{**empty, **known, **values})

    def _usage(self, usage: Any, model: str) -> dict[str, Any]:
        if not isinstance(usage, Mapping):
            return {}
        prompt_details = usage.get("prompt_tokens_details") or {}
        completion_details = usage.get("completion_tokens_details") or {}
        tokens = Tokens(
            usage.get("prompt_tokens") or 0,
            prompt_details.get("cached_tokens") or 0,
            prompt_details.get("cache_write_tokens") or 0,
            usage.get("completion_tokens") or 0,
            completion_details.get("reasoning_tokens") or 0,
        )
        return {
            "prompt_tokens": tokens.prompt,
            "cached_tokens": tokens.cached,
            "cache_write_tokens": tokens.cache_write,
            "completion_tokens": tokens.completion,
            "reasoning_tokens": tokens.reasoning,
            "cost": self.price.cost(tokens)
            if self.price is not None and model == self.config.model
            else None,
        }


def stored_verdicts(asking: Asking, questions: Iterable[Question], store: Store) -> list[Verdict]:
    """The verdicts of the questions that the store settles."""
    found = ((question, *asking.unanswered(question, store)) for question in questions)
    return [asking.verdict(question, calls) for question, request, calls in found if request is None]


def _clean(text: Any) -> str | None:
    """Text that can be stored: half of a surrogate pair becomes a replacement character."""
    if not isinstance(text, str):
        return None
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
