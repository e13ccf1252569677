"""One row of data as text, and the count of the rows that could not become one."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from drpo.config import key
from drpo.data.markup import MarkedPrompt, Span

Message = Mapping[str, Any]
NUM_SHOWN = 3
MAX_SCORE = sys.float_info.max


class DataError(ValueError):
    """Data that cannot be used as configured; the message names the fault, its place and the remedy."""


class RowError(Exception):
    """A row that cannot become a record: `kind` is counted, `detail` is shown for the first few of a kind."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Chat:
    """How a chat template made a record's texts, and from which messages."""

    messages: tuple[Message, ...]
    "The turns of the prompt: a model with another template renders them anew."
    source: str
    "The prompt as the data has it, the same under every template."
    opening: str = ""
    "What the template writes between the prompt and a plain reply; the record's responses begin with it."
    literal: tuple[Span, ...] = ()
    "Where the prompt has special tokens that a message spells out: ordinary text."
    arguments: Mapping[str, Any] = field(default_factory=dict)
    "The template's arguments."


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt with all that the data has on responses to it.

    Response texts have their own leading whitespace (" a summary") and no stop token, which is added when a
    response is encoded. `prompt + response` is the text as the model sees it.
    """

    prompt: str
    "Text that ends where the response begins."
    completion: str | None = None
    "A demonstration or high-quality reference."
    chosen: str | None = None
    "The preferred response of a pair."
    rejected: str | None = None
    "The other response of that pair."
    responses: tuple[str, ...] = ()
    "Ranked data: the responses, in the order of the data."
    scores: tuple[float, ...] = ()
    "Ranked data: one score for each response, higher is better."
    origin: str = ""
    'Place of the row, as "axis.jsonl:17".'
    extra: Mapping[str, Any] = field(default_factory=dict)
    "Everything else that the row carried, as JSON values."
    chat: Chat | None = None
    "How a chat template made these texts; None for texts of the data's own."

    @property
    def shared_prompt(self) -> str:
        """The prompt as every model, judge and stage knows it, independent of the chat template."""
        return self.prompt if self.chat is None else self.chat.source

    @property
    def marked_prompt(self) -> MarkedPrompt:
        """The prompt and the special tokens in it that are ordinary text; equal values are the same tokens."""
        return self.prompt, () if self.chat is None else self.chat.literal

    @property
    def opening(self) -> str:
        """The text that a chat template writes between the prompt and a plain reply; "" without one."""
        return "" if self.chat is None else self.chat.opening

    def with_prompt(self, prompt: MarkedPrompt) -> Record:
        """Return the record with another text of its prompt, such as a shorter one."""
        text, literal = prompt
        chat = None if self.chat is None else replace(self.chat, literal=literal)
        return replace(self, prompt=text, chat=chat)

    def without_opening(self, response: str) -> str:
        """Return a response of this record without the text that a chat template writes before it."""
        return response.removeprefix(self.opening)


class BadRows:
    """Counter of bad rows by kind, with the first few of each kind and their origin."""

    def __init__(self, unit: str = "rows") -> None:
        self.unit = unit
        self.counts: Counter[str] = Counter()
        self._shown: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return sum(self.counts.values())

    def add(self, kind: str, origin: str, detail: str = "") -> None:
        """Count one bad row of this kind."""
        self.counts[kind] += 1
        shown = self._shown.setdefault(kind, [])
        if len(shown) < NUM_SHOWN:
            shown.append(f"{origin}: {detail}" if detail else origin)

    @contextmanager
    def skipping(self, origin: str) -> Iterator[None]:
        """Count the row at `origin` as bad when a RowError ends this context."""
        try:
            yield
        except RowError as error:
            self.add(error.kind, origin, error.detail)

    def summary(self) -> str:
        """Return a line for each kind with its count, and below it the first few of that kind."""
        if not self.counts:
            return f"no bad {self.unit}"
        lines = []
        for kind, count in self.counts.most_common():
            lines.append(f"{count} x {kind}")
            lines += [f"    {shown}" for shown in self._shown[kind]]
            if count > len(self._shown[kind]):
                lines.append(f"    ... and {count - len(self._shown[kind])} more")
        return "\n".join(lines)

    def check(self, num_rows: int, max_bad_fraction: float, name: str | None = None) -> None:
        """Raise DataError when more than this fraction of `num_rows` rows are bad; `name` is the key of the setting."""
        if len(self) <= max_bad_fraction * num_rows:
            return
        name = name or key("max_bad_fraction")
        raise DataError(
            f"{len(self)} of {num_rows} {self.unit} are bad, "
            f"more than {name}={max_bad_fraction:g} allows:\n"
            f"{self.summary()}\n"
            f"Correct them, or raise {name} to leave them out."
        )


def require_text(value: object, field: str) -> str:
    """Return `value` if it is usable text, else raise RowError: missing, wrong type, empty or invalid."""
    if value is None:
        raise RowError("missing field", f"no {field}")
    if not isinstance(value, str):
        raise RowError("wrong type", f"{field} is {type(value).__name__}, not text")
    if not value.strip():
        raise RowError("empty text", field)
    require_encodable(value, field)
    return value


def require_encodable(text: str, field: str) -> None:
    """Raise RowError when a text has no UTF-8, which JSON can spell: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("invalid text", f"{field} holds half of a surrogate pair") from None


def require_scores(value: object, field: str, num_responses: int) -> tuple[float, ...]:
    """Return `value` as one finite number for each response, else raise RowError."""
    if value is None:
        raise RowError("missing field", f"no {field}")
    if not isinstance(value, list | tuple):
        raise RowError("wrong type", f"{field} is {type(value).__name__}, not a list of numbers")
    for score in value:
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise RowError("wrong type", f"{field} holds {score!r}, not a number")
        if not -MAX_SCORE <= score <= MAX_SCORE:
            raise RowError("score not finite", f"{field} holds {score}")
    if len(value) != num_responses:
        raise RowError("responses and scores differ", f"{num_responses} responses, {len(value)} {field}")
    return tuple(float(score) for score in value)


def require_different(chosen: str | None, rejected: str | None) -> None:
    """Raise RowError when a pair has only one response, or two that are equal, surrounding whitespace aside."""
    if (chosen is None) != (rejected is None):
        raise RowError("missing field", "one of chosen and rejected is there, the other is not")
    if chosen is not None and chosen.strip() == rejected.strip():
        raise RowError("chosen = rejected", repr(chosen.strip()[:60]))
