"""Read JSONL: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, AnyStr

from drpo.data.records import DataError


def lines_of(text: AnyStr) -> Iterator[tuple[int, AnyStr]]:
    r"""Yield the lines of `text` that are not blank, with their numbers (from 1). Only \n and \r\n end a line.

    JSON strings may contain U+2028, U+2029 and U+0085 unescaped, and `str.splitlines` would cut the line there.
    """
    newline, carriage_return = (b"\n", b"\r") if isinstance(text, bytes) else ("\n", "\r")
    for number, line in enumerate(text.split(newline), start=1):
        if line.strip():
            yield number, line.removesuffix(carriage_return)


def object_in(line: str | bytes, place: str) -> dict[str, Any]:
    """Parse one line. Raises DataError that names `place` if it is not a JSON object."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place} is not JSON ({error}); a last line is unfinished while a run writes it, or after a kill"
        ) from None
    if not isinstance(values, dict):
        raise DataError(f"{place} must be a JSON object, got {type(values).__name__}")
    return values


def read_objects(path: Path | str) -> list[dict[str, Any]]:
    """Read the objects of a JSONL file. Raises DataError that names file and line for anything else."""
    lines = lines_of(Path(path).read_bytes())
    return [object_in(line, f"{path}:{number}") for number, line in lines]
