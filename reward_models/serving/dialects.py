"""What servers of other projects are asked for scores, and how they answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

from drpo.config import ConfigError
from drpo.rewards import Completion
from reward_models.serving.connection import Call, Connection


class Dialect(Protocol):
    """A kind of server: the calls that score completions, and the scores in their answers."""

    identity: str
    "Of the model that is served, as far as the server says."
    max_tokens: int | None
    "Most tokens of the policy that it reads; None where that is not known."
    max_bytes: int | None
    "Most bytes of a request; None where that is not known."

    def calls(self, completions: Sequence[Completion]) -> list[tuple[Call, int]]:
        """Return calls, each for so many of the completions, in their order."""
        ...

    def scores(self, answer: Any) -> list[float]:
        """Return the scores of one answer. Raises ConfigError for an answer of another shape or model."""
        ...


class OpenRLHF:
    """OpenRLHF's remote reward model: texts in one string, special tokens left to the server.

    Its own server puts a stop token after every text, so it cannot see whether a response ended. It does not say what
    it serves, so its address stands for its model.
    """

    max_tokens = max_bytes = None

    def __init__(self, url: str, batch_size: int) -> None:
        self.identity = f"openrlhf at {url.rstrip('/')}"
        self._path = "" if urlsplit(url).path.strip("/") else "/get_reward"
        self._batch_size = batch_size

    def calls(self, completions: Sequence[Completion]) -> list[tuple[Call, int]]:
        """Labels are the references of the data, where it has some."""
        calls: list[tuple[Call, int]] = []
        for part in parts(completions, self._batch_size):
            body = {
                "query": [c.prompt + c.response for c in part],
                "prompts": [c.prompt for c in part],
                "labels": [c.record.completion or "" for c in part],
            }
            calls.append((("POST", self._path, body), len(part)))
        return calls

    def scores(self, answer: Any) -> list[float]:
        return numbers(answer, "rewards")


class VLLM:
    """A classifier with one label that vLLM serves (`vllm serve MODEL --runner pooling`): its logit, not the sigmoid.

    Plain texts go many in a request, conversations one each, which the server renders by its chat template.
    """

    max_tokens = max_bytes = None

    def __init__(self, connection: Connection, batch_size: int, model: str | None, stop_text: str) -> None:
        """Ask which models there are. Raises ConfigError when `model` is none of them."""
        answer = connection.call("GET", "/v1/models")
        try:
            names = [entry["id"] for entry in answer["data"]]
            self._model = names[0] if model is None else model
        except (LookupError, TypeError):
            raise ConfigError(f"reward.url: {connection.url}/v1/models names no model: {answer}") from None
        if self._model not in names:
            raise ConfigError(f"reward.server.model={model!r} is not served, but {', '.join(names)}")
        self.identity = f"vllm:{self._model}" + f", after a response {stop_text!r}" * bool(stop_text)
        self._batch_size, self._stop_text = batch_size, stop_text

    def calls(self, completions: Sequence[Completion]) -> list[tuple[Call, int]]:
        options = {"model": self._model, "use_activation": False}
        bodies: list[tuple[dict[str, Any], int]] = []
        if completions and completions[0].record.chat is not None:
            for completion in completions:
                reply = {"role": "assistant", "content": completion.response}
                bodies.append(({"messages": [*completion.record.chat.messages, reply]}, 1))
        else:
            for part in parts(completions, self._batch_size):
                texts = [c.prompt + c.response + self._stop_text * c.ended for c in part]
                bodies.append(({"input": texts}, len(part)))
        return [(("POST", "/classify", body | options), num_rows) for body, num_rows in bodies]

    def scores(self, answer: Any) -> list[float]:
        try:
            rows = sorted(answer["data"], key=lambda row: row["index"])
            in_order = [row["index"] for row in rows] == list(range(len(rows)))
            probs = [list(row["probs"]) for row in rows]
            model = answer["model"]
        except (LookupError, TypeError):
            raise ConfigError(f"reward.url: no classification: {str(answer)[:200]}") from None
        if not in_order or any(len(labels) != 1 for labels in probs):
            raise ConfigError(
                f"reward.url: {self._model} is no reward model: it gives {len(probs[0]) if probs else 0} numbers for a "
                "text, and a reward model gives 1"
            )
        if model != self._model:
            raise ConfigError(f"reward.url: {model} answers in place of {self._model}")
        return numbers({"probs": [label for (label,) in probs]}, "probs")


def parts(completions: Sequence[Completion], size: int) -> list[Sequence[Completion]]:
    """Cut completions into parts of `size`, the last perhaps smaller."""
    return [completions[start : start + size] for start in range(0, len(completions), size)]


def numbers(answer: Any, field: str) -> list[float]:
    """Return the list of finite numbers in a field of an answer. Raises ConfigError for anything else."""
    values = answer.get(field) if isinstance(answer, dict) else None
    if not isinstance(values, list) or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
        raise ConfigError(
            f"reward.url: expected a list of finite numbers as {field!r}, got {str(answer)[:200]}"
        )
    return [float(value) for value in values]
