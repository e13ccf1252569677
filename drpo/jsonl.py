"""Read JSONL (one JSON object per line), check the fields of its lines, and write files atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, AnyStr

from drpo.data.records import DataError, RowError, require_encodable

MAX_INT = 2**63 - 1


def lines_of(text: AnyStr) -> Iterator[tuple[int, AnyStr]]:
    r"""Yield the lines of `text` that are not blank, with their numbers (from 1). Only \n and \r\n end a line.

    JSON strings may contain U+2028, U+2029 and U+0085 unescaped, and `str.splitlines` would cut the line there.
    """
    newline, carriage_return = (b"\n", b"\r") if isinstance(text, bytes) else ("\n", "\r")
    for number, line in enumerate(text.split(newline), start=1):
        if line.strip():
            yield number, line.removesuffix(carriage_return)


def object_in(line: str | bytes, place: str) -> dict[str, Any]:
    """Parse one line; raise DataError, naming `place`, if it is not a JSON object."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place} is not JSON ({error}); remove a damaged line (the last one is unfinished while a run writes it, "
            "or after a kill)"
        ) from None
    if not isinstance(values, dict):
        raise DataError(f"{place} must be a JSON object, got {type(values).__name__}")
    return values


def read_objects(path: Path | str) -> list[dict[str, Any]]:
    """Read the objects of a JSONL file; raise DataError, naming file and line, for anything else."""
    lines = lines_of(Path(path).read_bytes())
    return [object_in(line, f"{path}:{number}") for number, line in lines]


def fields_of_line(line: bytes, types: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """Parse a line of a file that DRPO wrote; raise RowError unless its fields are those of `types`.

    Integers must lie in [0, 2^63), and text must be encodable. A bool is not a number.
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
    """Replace lone surrogates, which JSON can contain but UTF-8 cannot encode."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def write_whole(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to a file atomically; a kill or a full disk leaves the old content."""
    replacement = path.with_name(path.name + ".tmp")
    try:
        with replacement.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        replacement.replace(path)
    finally:
        replacement.unlink(missing_ok=True)
