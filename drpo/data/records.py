"""One row of data as text, and the count of the rows that could not become one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NUM_SHOWN = 3


class DataError(ValueError):
    """The data cannot be used as asked; the message says what was wrong, where, and what to do."""


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt with whatever the data says about responses to it.

    Response texts carry their own leading whitespace (" a summary") and never a stop token: that is added
    when a response is encoded. `prompt + response` is the text as the model sees it.
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
    'Where the row stands, as "axis.jsonl:17".'
    extra: Mapping[str, Any] = field(default_factory=dict)
    "Everything else that the row carried, as JSON values."


class BadRows:
    """Counts bad rows by kind and remembers the first few of each kind with their origin."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._shown: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return self.counts.total()

    def add(self, kind: str, origin: str, detail: str = "") -> None:
        """Count one bad row of this kind."""
        self.counts[kind] += 1
        shown = self._shown.setdefault(kind, [])
        if len(shown) < NUM_SHOWN:
            shown.append(f"{origin}: {detail}" if detail else origin)

    def summary(self) -> str:
        """One line for each kind with its count, and below it the first few rows; "no bad rows" if there are none."""
        if not self.counts:
            return "no bad rows"
        lines = []
        for kind, count in self.counts.most_common():
            lines.append(f"{count} x {kind}")
            lines += [f"    {shown}" for shown in self._shown[kind]]
            if count > len(self._shown[kind]):
                lines.append(f"    ... and {count - len(self._shown[kind])} more")
        return "\n".join(lines)

    def check(self, num_rows: int, max_bad_fraction: float) -> None:
        """Raise DataError when more than `max_bad_fraction` of `num_rows` rows are bad."""
        num_bad = len(self)
        if num_bad <= max_bad_fraction * num_rows:
            return
        raise DataError(
            f"{num_bad} of {num_rows} rows are bad, more than data.max_bad_fraction={max_bad_fraction:g} allows:\n"
            f"{self.summary()}\n"
            "Correct these rows, or raise data.max_bad_fraction to leave them out."
        )
