"""Lines of our own JSONL files: objects with exactly the fields that they should have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from drpo.data.records import RowError, require_encodable

MAX_INT = 2**63 - 1


def fields_of_line(line: bytes, types: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """The fields of a line. Raises RowError unless it is an object with all of `types` and nothing else.

    Whole numbers must lie in [0, 2^63), and what is text must be encodable. A bool is no number.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RowError("invalid JSON", str(error)) from None
    if not isinstance(values, dict):
        raise RowError("wrong type", f"a row is an object, not {type(values).__name__}")
    for name, allowed in types.items():
        if name not in values:
            raise RowError("missing field", f"no {name}")
        value = values[name]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise RowError("wrong type", f"{name} is {type(value).__name__}")
        if isinstance(value, int) and float not in allowed and not 0 <= value <= MAX_INT:
            raise RowError("number out of range", f"{name} must be in [0, 2^63)")
        if isinstance(value, str):
            require_encodable(value, name)
    if extra := values.keys() - types.keys():
        raise RowError("unknown field", ", ".join(sorted(extra)))
    return values


def encodable(text: str) -> str:
    """Replace the halves of surrogate pairs, which JSON can hold and no file can."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
