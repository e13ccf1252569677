"""Completions on disk: one JSON line per system and prompt, and a meta file on how they were made.

    {"system": "drpo", "prompt_id": "9c1185a5c5e9fc54", "prompt": "...", "response": "...", "ended": true,
     "num_tokens": 31, "seed": 0, "reference": "...", "meta": {}}

A system is anything that answers prompts: a checkpoint, a person, a constant. `x.jsonl` comes with `x.meta.json`,
which contains the hashes of model, data and settings; a file is resumed only with the same ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from drpo.data.records import BadRows, DataError, Message, Record, RowError, require_encodable, require_text
from drpo.jsonl import fields_of_line, lines_of, write_whole

REFERENCE = "reference"
"System of the dataset's own responses."
NULL = "null"
"System that gives the same response to every prompt."
MESSAGES = "prompt_messages"
"Key of a row's meta: the chat turns of the prompt, where a chat template was used."
NULL_RESPONSE = "This is my response, and there is nothing to add to it."


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """The response of one system to one prompt."""

    system: str
    prompt_id: str
    "First 16 hex digits of the prompt's sha256."
    prompt: str
    response: str
    "May be empty: a policy can stop at once."
    ended: bool
    "Whether the response is complete, not cut at a length limit."
    num_tokens: int | None
    "Number of tokens of the response, stop token included; None if unknown."
    seed: int
    "Distinguishes several responses of one system to one prompt."
    reference: str | None = None
    "The dataset's own response."
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int]:
        """Unique key of the row: system, prompt and seed."""
        return self.system, self.prompt_id, self.seed

    @property
    def messages(self) -> tuple[Message, ...] | None:
        """Chat turns of the prompt; None where no chat template was used."""
        turns = self.meta.get(MESSAGES)
        if turns is None:
            return None
        if not isinstance(turns, list | tuple) or not all(isinstance(turn, Mapping) for turn in turns):
            raise DataError(f"meta.{MESSAGES} of {_named(self)} is no list of messages")
        return tuple(turns)

    @property
    def prompt_meta(self) -> dict[str, Any]:
        """The part of `meta` that depends on the prompt alone."""
        return {MESSAGES: self.meta[MESSAGES]} if MESSAGES in self.meta else {}


def is_built_in(system: str) -> bool:
    """Return whether a name is taken: by the references, the constant response, or an attack on the judge."""
    return system in (REFERENCE, NULL) or "attack/" in system


def messages_meta(record: Record) -> dict[str, Any]:
    """Return the part of a row's `meta` on the prompt's turns; empty where no chat template was used."""
    return {} if record.chat is None else {MESSAGES: [dict(turn) for turn in record.chat.messages]}


def prompt_id_of(prompt: str) -> str:
    """Return the id of a prompt: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


# --- reading --------------------------------------------------------------------------------------------


def read_completions(path: Path | str) -> list[CompletionRow]:
    """Read the rows of a completions file.

    Raises DataError for a missing file and for bad rows, all counted: a line that is not JSON (such as a partial
    last line left by a kill), a missing or mistyped field, a prompt_id that does not match the prompt, a second row
    of the same system, prompt and seed.
    """
    path = _existing(path)
    content = path.read_bytes()
    if content.rpartition(b"\n")[2].strip():
        raise DataError(
            f"{path} ends in an unfinished line: the run that wrote it was killed; run it again to complete the file"
        )
    numbered = ((f"{path.name}:{number}", line) for number, line in lines_of(content))
    return parse_rows(path, numbered, _row_of_line)


def import_alpaca_eval(path: Path | str) -> list[CompletionRow]:
    """Read a file in alpaca_eval's format: a JSON list of objects with instruction, output and generator.

    Other fields of an object are kept in `meta`. Raises DataError as `read_completions` does.
    """
    path = _existing(path)
    items = _json_of(path, list, "list of objects with instruction, output, generator")
    numbered = ((f"{path.name}[{number}]", item) for number, item in enumerate(items))
    return parse_rows(path, numbered, _row_of_alpaca_eval)


def load_completions(paths: Sequence[Path | str]) -> list[CompletionRow]:
    """Read several files: `.json` in alpaca_eval's format, all others with `read_completions`.

    Raises DataError when two files have a row of the same system, prompt and seed.
    """
    rows: dict[tuple[str, str, int], CompletionRow] = {}
    for path in paths:
        read = import_alpaca_eval if Path(path).suffix == ".json" else read_completions
        for row in read(path):
            if row.key in rows:
                raise DataError(f"{path} repeats {_named(row)} of an earlier file; give each row once")
            rows[row.key] = row
    return list(rows.values())


def _existing(path: Path | str) -> Path:
    if not Path(path).is_file():
        raise DataError(f"no completions file {path}")
    return Path(path)


def _json_of(path: Path, kind: type, content: str) -> Any:
    """Parse a JSON file. Raises DataError unless it contains a `kind`, described as `content`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise DataError(f"{path} must hold a JSON {content}")
    return value


def parse_rows(
    path: Path | str,
    numbered: Iterable[tuple[str, Any]],
    parse: Callable[[Any], CompletionRow],
    bad: BadRows | None = None,
) -> list[CompletionRow]:
    """Parse all rows of a file, each with its origin; `bad` contains those that could not be read at all.

    Raises DataError for bad or repeated rows, all counted, and for no rows.
    """
    rows: dict[tuple[str, str, int], CompletionRow] = {}
    bad = BadRows() if bad is None else bad
    for origin, item in numbered:
        try:
            row = parse(item)
            if row.key in rows:
                raise RowError("repeated row", _named(row))
            rows[row.key] = row
        except RowError as error:
            bad.add(error.kind, origin, error.detail)
    if bad:
        raise DataError(f"{path} cannot be used, {len(bad)} rows are bad:\n{bad.summary()}")
    if not rows:
        raise DataError(f"{path} has no rows")
    return list(rows.values())


def _named(row: CompletionRow) -> str:
    return f"system {row.system}, prompt {row.prompt_id}, seed {row.seed}"


_TYPES: dict[str, tuple[type, ...]] = {
    "system": (str,),
    "prompt_id": (str,),
    "prompt": (str,),
    "response": (str,),
    "ended": (bool,),
    "num_tokens": (int, type(None)),
    "seed": (int,),
    "reference": (str, type(None)),
    "meta": (dict,),
}


def _row_of_line(line: bytes) -> CompletionRow:
    values = fields_of_line(line, _TYPES)
    for name in ("system", "prompt"):
        require_text(values[name], name)
    if values["prompt_id"] != prompt_id_of(values["prompt"]):
        raise RowError("prompt_id is not of this prompt", values["prompt_id"])
    return CompletionRow(**values)


def _row_of_alpaca_eval(item: Any) -> CompletionRow:
    if not isinstance(item, dict):
        raise RowError("wrong type", f"a row is an object, not {type(item).__name__}")
    prompt = require_text(item.get("instruction"), "instruction")
    system = require_text(item.get("generator"), "generator")
    response = item.get("output")
    if not isinstance(response, str):
        raise RowError("missing field" if response is None else "wrong type", "output")
    require_encodable(response, "output")
    meta = {name: value for name, value in item.items() if name not in ("instruction", "output", "generator")}
    return CompletionRow(system, prompt_id_of(prompt), prompt, response, True, None, 0, meta=meta)


# --- writing --------------------------------------------------------------------------------------------


class CompletionsWriter:
    """A completions file to append to; every row is on disk when `write` returns.

    `done` contains the keys of the rows of earlier runs; a partial last line left by a kill is truncated. The file
    is locked until `close`, or until the writer is garbage collected.
    Raises DataError when another writer has the file, or when it was made with another `meta`.
    """

    def __init__(self, path: Path | str, meta: Mapping[str, Any]) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise DataError(f"completions cannot be written to {self.path}: {error}") from None
        self.close = weakref.finalize(self, self._file.close)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise DataError(f"{self.path} is being written by another run; wait for it or stop it") from None
        try:
            meta = json.loads(json.dumps(meta))
            if content := self.path.read_bytes():
                self._refuse_other(meta)
            num_whole = content.rfind(b"\n") + 1
            self._file.truncate(num_whole)
            self.done = {row.key for row in read_completions(self.path)} if num_whole else set()
            write_whole(meta_path(self.path), json.dumps(meta, indent=1) + "\n")
        except BaseException:
            self.close()
            raise

    def write(self, rows: Sequence[CompletionRow]) -> None:
        """Append all rows, or none if writing fails. Raises DataError for a duplicate."""
        for row in rows:
            if row.key in self.done:
                raise DataError(f"{self.path} already has {_named(row)}")
            self.done.add(row.key)
        lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        # Lone surrogates, which meta may contain, are written as JSON escapes.
        unwritten = memoryview(lines.encode(errors="backslashreplace"))
        size = os.fstat(self._file.fileno()).st_size
        try:
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(size)
            self.done -= {row.key for row in rows}
            raise

    def _refuse_other(self, meta: Mapping[str, Any]) -> None:
        earlier = read_meta(self.path)
        changed = [name for name in sorted({*earlier, *meta}) if earlier.get(name) != meta.get(name)]
        if changed:
            listed = "; ".join(f"{name}: {earlier.get(name)!r} -> {meta.get(name)!r}" for name in changed)
            raise DataError(
                f"{self.path} was made in another way ({listed}); choose another file or remove it"
            )


def meta_path(path: Path | str) -> Path:
    """Return the path of a completions file's meta file: `x.jsonl` -> `x.meta.json`."""
    return Path(path).with_suffix(".meta.json")


def read_meta(path: Path | str) -> dict[str, Any]:
    """Read the meta file of a completions file; empty if there is none. Raises DataError for an unreadable one."""
    path = meta_path(path)
    if not path.exists():
        return {}
    return _json_of(path, dict, "object")
