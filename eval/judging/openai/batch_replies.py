"""Read replies of the Batch API: files, batches, rows. Anything else raises NotAnAnswer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from openai.types import Batch, FileObject

from drpo.jsonl import lines_of
from eval.judging.openai.answer import json_or_none
from eval.judging.openai.answer_body import objects_in
from eval.judging.openai.retry import NotAnAnswer

Named = TypeVar("Named", FileObject, Batch)


def with_id(reply: Any, kind: type[Named]) -> Named:
    """Return a file or batch. Raises NotAnAnswer for other bodies, which the client returns as they are."""
    if not isinstance(reply, kind) or not isinstance(reply.id, str):
        raise NotAnAnswer(str(reply)[:80])
    return reply


def batch_called(name: str, key: str, listed: Any) -> Batch | None:
    """Return the listed batch whose metadata has `name` under `key`. Raises NotAnAnswer for anything but a list."""
    for batch in objects_in(listed):
        metadata = batch.get("metadata")
        if isinstance(metadata, Mapping) and metadata.get(key) == name:
            return with_id(Batch.construct(**batch), Batch)
    return None


def rows_in(content: bytes, file_id: str, num_expected: int | None) -> list[dict[str, Any]]:
    """Parse the rows of a file of answers or errors.

    Raises NotAnAnswer for a line that is not a row, and for an empty file where `num_expected` is not 0: without the
    answers their requests would be submitted, and paid, again.
    """
    rows = []
    for number, line in lines_of(content):
        row = json_or_none(line)
        if not isinstance(row, dict) or not isinstance(row.get("custom_id"), str):
            text = line[:80].decode(errors="replace")
            raise NotAnAnswer(f"line {number} of {file_id} is not a row of a batch: {text}")
        rows.append(row)
    if not rows and num_expected:
        raise NotAnAnswer(f"{file_id} is empty; expected {num_expected} answers")
    return rows


def status_of(row: Mapping[str, Any], response: Mapping[str, Any]) -> int:
    """Return the HTTP status of a row. A row without one has 200 if it holds an answer, else 500."""
    status, body = response.get("status_code"), response.get("body")
    status = int(status) if isinstance(status, str) and status.isdecimal() else status
    if isinstance(status, int) and status >= 100:
        return status
    return 200 if isinstance(body, dict) and body.get("choices") and not row.get("error") else 500


def reasons_of(batch: Batch) -> str:
    """Format the reasons why a batch was not accepted, at most three."""
    errors = getattr(batch.errors, "data", batch.errors)
    if isinstance(errors, list):
        reasons = (f"{getattr(e, 'code', None)}: {getattr(e, 'message', None) or e}" for e in errors[:3])
        return "; ".join(reasons) or "no reason given"
    return str(errors or "no reason given")[:200]
