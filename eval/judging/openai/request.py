"""One call to a judge model: the body of the request, its key in the store, and the record of its answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from eval.judging.injection import suspicions
from eval.judging.matchup import Question
from eval.judging.openai.answer import Answer, Form, JudgePrompt, ParsedAnswer
from eval.judging.openai.answer_body import answer_in, text_or_none
from eval.judging.openai.prices import Price, prompt_tokens_at_most
from eval.judging.openai.settings import OpenAISettings
from eval.judging.openai.store import Call, Store, call_key, now
from eval.judging.verdict import Status, Verdict, verdict_on, winner_of

MAX_TOKENS = 10**9
"A server that reports more tokens for one call has miscounted."


@dataclass(frozen=True, slots=True)
class Request:
    """The body of the request for a question, and its key in the store."""

    key: str
    sample: int
    body: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        """Texts that count as prompt tokens: the messages and the schema."""
        schema = [json.dumps(self.body["response_format"])] if "response_format" in self.body else []
        return [message["content"] for message in self.body["messages"]] + schema


@dataclass(frozen=True)
class JudgeSetup:
    """Settings, prompt, form and price shared by all calls of a run."""

    config: OpenAISettings
    prompt: JudgePrompt
    ties: bool
    form: Form
    price: Price | None

    def request(self, question: Question, sample: int) -> Request:
        """Make the request of a question; `sample` > 0 asks again."""
        config = self.config
        body: dict[str, Any] = {
            "model": config.model,
            "messages": self.prompt.messages(question, self.form, self.ties, sample),
            config.output_limit: config.max_output_tokens,
        }
        if config.temperature is not None:
            body["temperature"] = config.temperature
        if config.reasoning_effort is not None:
            body["reasoning_effort"] = config.reasoning_effort
        if self.form == "json":
            body["response_format"] = self.prompt.response_format(self.ties)
        key = call_key({"url": config.url.rstrip("/"), "body": body, "sample": sample})
        return Request(key, sample, body)

    def max_usd(self, request: Request) -> float:
        """Return the maximum cost in dollars of sending a request once; 0 without a price."""
        if self.price is None:
            return 0.0
        return self.price.at_most(prompt_tokens_at_most(request.texts), self.config.max_output_tokens)

    def read(self, call: Call) -> ParsedAnswer:
        """Parse the answer of a call with the current parser."""
        if call.status == "failed" or (call.text is None and call.status == "refused"):
            return ParsedAnswer(call.status, None, call.detail)
        if call.text is None and call.finish_reason is None:
            return ParsedAnswer("malformed", None, "an answer without choices")
        answer = Answer(call.text, call.refusal, call.finish_reason)
        return self.prompt.parse(answer, self.form, self.ties)

    def unanswered(self, question: Question, store: Store) -> tuple[Request | None, list[Call]]:
        """Return the next request of a question, None if it is answered, and its stored answers."""
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
        """Return the verdict on a question by the last of its calls."""
        parsed = self.read(calls[-1])
        matchup = question.matchup
        return verdict_on(
            question,
            parsed.status,
            None if parsed.slot is None else winner_of(parsed.slot, question.order),
            detail=parsed.detail,
            suspicions_a=suspicions(matchup.response_a),
            suspicions_b=suspicions(matchup.response_b),
            keys=tuple(call.key for call in calls),
        )

    # --- records ----------------------------------------------------------------------------------------

    def answered(self, request: Request, payload: Any, backend: str, **values: Any) -> Call:
        """Record an answer, given as the JSON of a chat completion; `values` are further fields of the call.

        Raises the errors of `answer_in`.
        """
        answer = answer_in(payload, "" if self.form == "json" else "\n")
        call = self.record(
            request,
            backend,
            "ok",  # until it is read
            model_returned=text_or_none(payload.get("model")),
            fingerprint=text_or_none(payload.get("system_fingerprint")),
            **asdict(answer),
            **self._usage(payload.get("usage"), request.body["model"]),
            **values,
        )
        parsed = self.read(call)
        return replace(call, status=parsed.status, slot=parsed.slot, detail=parsed.detail)

    def record(self, request: Request, backend: str, status: Status, **values: Any) -> Call:
        """Record a call, sent once, with `values` for further fields; those without a value are None."""
        values_of_request = {
            "key": request.key,
            "model": request.body["model"],
            "sample": request.sample,
            "backend": backend,
            "status": status,
            "num_attempts": 1,
            "time": now(),
            "request": json.dumps(request.body, ensure_ascii=False),
        }
        return Call(**dict.fromkeys(Call.__dataclass_fields__) | values_of_request | values)

    def _usage(self, usage: Any, model: str) -> dict[str, Any]:
        """Return tokens and cost; empty if the server does not count both sides: the upper bound is charged."""
        prompt, completion = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
        if prompt is None or completion is None:
            return {}
        prompt_details = usage.get("prompt_tokens_details")
        cached = _count(prompt_details, "cached_tokens") or 0
        cache_write = _count(prompt_details, "cache_write_tokens") or 0
        reasoning = _count(usage.get("completion_tokens_details"), "reasoning_tokens") or 0
        priced = self.price is not None and model == self.config.model
        return {
            "prompt_tokens": prompt,
            "cached_tokens": cached,
            "cache_write_tokens": cache_write,
            "completion_tokens": completion,
            "reasoning_tokens": reasoning,
            "cost": self.price.cost(prompt, cached, cache_write, completion) if priced else None,
        }


def stored_verdicts(setup: JudgeSetup, questions: Iterable[Question], store: Store) -> list[Verdict]:
    """Return the verdicts of the questions that the store answers."""
    stored = ((question, *setup.unanswered(question, store)) for question in questions)
    return [setup.verdict(question, calls) for question, request, calls in stored if request is None]


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, Mapping) else None
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value <= MAX_TOKENS else None
