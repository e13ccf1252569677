"""Systems that need no model: the dataset's own responses, and a constant response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from drpo.data.records import BadRows, DataError
from eval.completions.rows import REFERENCE, CompletionRow


def reference_rows(rows: Sequence[CompletionRow]) -> list[CompletionRow]:
    """Return the dataset's own responses as the system "reference", one for each prompt.

    Raises DataError, with their number, when prompts have no reference or several different ones.
    """
    references: dict[str, CompletionRow] = {}
    bad = BadRows("prompts")
    for row in rows:
        known = references.setdefault(row.prompt_id, row)
        if known.reference is None and row.reference is not None:
            references[row.prompt_id] = row
        elif row.reference not in (None, known.reference):
            bad.add("two references", row.prompt_id)
    for row in references.values():
        if row.reference is None:
            bad.add("no reference", row.prompt_id)
    if bad:
        raise DataError(f"the dataset's responses cannot be a system:\n{bad.summary()}")
    return [_answered(row, REFERENCE, row.reference) for row in references.values()]


def constant_rows(rows: Sequence[CompletionRow], system: str, response: str) -> list[CompletionRow]:
    """Return rows of a system that gives the same response to every prompt of `rows`."""
    prompts = {row.prompt_id: row for row in reversed(rows)}
    return [_answered(row, system, response) for row in reversed(prompts.values())]


def _answered(row: CompletionRow, system: str, response: str) -> CompletionRow:
    """Return a complete response to the row's prompt that no policy wrote."""
    answer = {"response": response, "ended": True, "num_tokens": None, "seed": 0}
    return replace(row, system=system, **answer, meta=row.prompt_meta)
