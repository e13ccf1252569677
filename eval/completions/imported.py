"""Completions that were made elsewhere: a table with columns of any name, or alpaca_eval's model_outputs.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from drpo.config import Section, key, refuse, refuse_changed
from drpo.data.files import Table, read_table
from drpo.data.records import BadRows, DataError, RowError, require_text
from drpo.jsonl import MAX_INT
from eval.completions.rows import CompletionRow, import_alpaca_eval, parse_rows, prompt_id_of

FIELDS = ("prompt", "response", "system", "reference", "ended", "seed", "num_tokens")


@dataclass(frozen=True)
class ImportConfig(Section):
    """Completions to take over from a file, in place of a policy's."""

    path: str | None = None
    """A local .jsonl, .json, .csv (each also .gz) or .parquet file; null: nothing is imported."""
    format: Literal["columns", "alpaca_eval"] = "columns"
    """columns: a row has the columns below; alpaca_eval: a list of objects with instruction, output, generator."""
    columns: dict[str, str] = field(default_factory=dict)
    """The name of the file's column for each of prompt, response, system, reference, ended, seed, num_tokens, where it
    differs: imported.columns.response=answer. Other columns are kept in meta."""

    def check(self) -> None:
        if self.format != "columns":
            refuse_changed(self, ["columns"], f"does not apply to {key('format')}={self.format}")
        for name in self.columns:
            refuse(name not in FIELDS, f"columns.{name}", f"is unknown; the fields are: {', '.join(FIELDS)}")


def import_rows(config: ImportConfig, system: str | None) -> list[CompletionRow]:
    """Read the rows of the file; `system`, if given, names them all, else each row must name its own.

    Only prompt and response are required. Defaults of the others: `ended` true, `seed` 0, `num_tokens` and
    `reference` None. Raises DataError for a missing file or column, and for bad rows, all counted.
    """
    path = Path(config.path).expanduser()
    if not path.is_file():
        raise DataError(f"imported.path: no file {config.path}")
    if config.format == "alpaca_eval":
        numbered = [(row.prompt_id, row) for row in import_alpaca_eval(path)]
        return parse_rows(config.path, numbered, lambda row: replace(row, system=system or row.system))
    bad = BadRows()
    table = read_table(config.path, "train", bad)
    column = _columns_of(config, table, system)
    numbered = [(row.origin, row.values) for row in table.rows]
    return parse_rows(config.path, numbered, lambda values: _row(values, column, system), bad)


def _columns_of(config: ImportConfig, table: Table, system: str | None) -> dict[str, str]:
    """Return the table's column for each field. Raises DataError for a missing one."""
    column = {name: config.columns.get(name, name) for name in FIELDS}
    needed = ["prompt", "response", *config.columns, *([] if system else ["system"])]
    for name in needed:
        if column[name] not in table.columns:
            hint = "; or name all rows with system=..." if name == "system" else ""
            raise DataError(
                f"no column {column[name]!r} (imported.columns.{name}) in {table.name}; its columns are: "
                f"{', '.join(table.columns)}{hint}"
            )
    return column


def _row(values: Mapping[str, Any], column: Mapping[str, str], system: str | None) -> CompletionRow:
    rest = dict(values)
    cells = {name: rest.pop(column[name], None) for name in FIELDS}
    prompt = require_text(cells["prompt"], column["prompt"])
    return CompletionRow(
        require_text(cells["system"], column["system"]) if system is None else system,
        prompt_id_of(prompt),
        prompt,
        _text(cells["response"], column["response"]),
        True if cells["ended"] is None else _bool(cells["ended"], column["ended"]),
        None if cells["num_tokens"] is None else _int(cells["num_tokens"], column["num_tokens"]),
        0 if cells["seed"] is None else _int(cells["seed"], column["seed"]),
        None if cells["reference"] is None else require_text(cells["reference"], column["reference"]),
        json.loads(json.dumps(rest, default=str)),
    )


def _text(value: Any, name: str) -> str:
    """Return the text, which may be empty but not missing."""
    return value if isinstance(value, str) and not value.strip() else require_text(value, name)


def _bool(value: Any, name: str) -> bool:
    value = {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value
    if not isinstance(value, bool):
        raise RowError("wrong type", f"{name} is {value!r}, not true or false")
    return value


def _int(value: Any, name: str) -> int:
    """Return the integer, parsed from text for CSV files."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 25:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_INT:
        raise RowError("wrong type", f"{name} is {value!r:.30}, not a whole number from 0 on, below 2^63")
    return value


def file_sha256(path: str) -> str:
    """Return the SHA-256 of a file's bytes."""
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
