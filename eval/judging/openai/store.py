"""The store: every answer of a paid judge, under a hash of everything that could change it.

One SQLite file. `calls` is append-only, with an answer (or a failure) per row; `requests` is the ledger: one row for
each request before it is sent, with its maximum cost, and its actual cost once that is known. Every change is committed
to disk before the next one, so a killed run loses no answer that it received, and requests in flight at that moment
still count against the budget.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import astuple, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from drpo.data.records import DataError
from eval.judging.verdict import Slot, Status

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Call:
    """One question to the judge, with its answer as received and as parsed."""

    key: str
    "Hash of the request and its destination."
    model: str
    "The requested model."
    sample: int
    "0, plus one for each retry after a malformed answer."
    backend: str
    "live or batch."
    status: Status
    slot: Slot | None
    detail: str
    text: str | None
    refusal: str | None
    finish_reason: str | None
    model_returned: str | None
    fingerprint: str | None
    request_id: str | None
    "The API's id of the request, for support."
    prompt_tokens: int | None
    cached_tokens: int | None
    "Prompt tokens read from the API's cache."
    cache_write_tokens: int | None
    "Prompt tokens written to it."
    completion_tokens: int | None
    reasoning_tokens: int | None
    "Hidden completion tokens."
    cost: float | None
    "Dollars; None where the price or the tokens are unknown."
    num_attempts: int
    latency: float | None
    "Seconds of the last attempt."
    time: str
    "UTC."
    request: str
    "The request's body, as JSON."


_COLUMNS = tuple(field.name for field in fields(Call))
_SCHEMA = f"""
CREATE TABLE calls (id INTEGER PRIMARY KEY, {", ".join(_COLUMNS)});
CREATE INDEX calls_by_key ON calls (key);
CREATE UNIQUE INDEX one_answer ON calls (key) WHERE status != 'failed';
CREATE TABLE requests (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, batch TEXT, reserved REAL NOT NULL, usd REAL, outcome TEXT,
    started TEXT NOT NULL
);
CREATE TABLE batches (
    name TEXT PRIMARY KEY, id TEXT, state TEXT NOT NULL, requests TEXT NOT NULL, started TEXT NOT NULL
);
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
PRAGMA user_version = {SCHEMA_VERSION};
"""
_SELECT_CALLS = f"SELECT {', '.join(_COLUMNS)} FROM calls"
_TABLES = {"calls", "requests", "batches", "facts"}


def call_key(parts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of everything that could change an answer, as 64 hex digits."""
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def now() -> str:
    """Return the time in UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


@dataclass(frozen=True, slots=True)
class Reservation:
    """A request in the ledger that is not settled, with its maximum cost."""

    number: int
    usd: float


@dataclass(frozen=True, slots=True)
class Ledger:
    """Sums over the requests of a store."""

    num_requests: int
    usd: float
    "Dollars paid, plus the maximum cost of unsettled requests."
    num_open: int
    "Unsettled requests: in flight now, or when a run was killed."
    open_usd: float
    "The part of `usd` that is the maximum cost of unsettled requests."


class Store:
    """The store in one file, for one process at a time.

    Raises DataError when another process has it open, it cannot be written, or it is not a store of this version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with ExitStack() as resources:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lock = resources.enter_context(self.path.with_name(self.path.name + ".lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._db = resources.enter_context(closing(sqlite3.connect(self.path, isolation_level=None)))
                self._open()
            except BlockingIOError:
                raise DataError(f"{self.path} is in use by another run; wait for it or stop it") from None
            # A full disk, or a file that may not be written.
            except (OSError, sqlite3.OperationalError) as error:
                raise DataError(f"no store of verdicts can be kept at {self.path}: {error}") from None
            except sqlite3.DatabaseError as error:
                raise DataError(f"{self.path} is not a store of verdicts: {error}") from None
            self._resources = resources.pop_all()

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # a commit survives a power loss
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            self._db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
        elif not tables >= _TABLES:
            raise DataError(
                f"{self.path} is not a store of verdicts: its tables are {', '.join(sorted(tables))}"
            )
        elif version != SCHEMA_VERSION:
            raise DataError(
                f"{self.path} has layout {version}, this version reads and writes {SCHEMA_VERSION}; keep it for the "
                "version that made it, and name another file with store="
            )
        (damage,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if damage != "ok":
            raise DataError(
                f"{self.path} is damaged ({damage}); put a copy of it in its place, or save what is left by "
                f"`sqlite3 {self.path} .recover`"
            )

    def close(self) -> None:
        self._resources.close()

    # --- answers ----------------------------------------------------------------------------------------

    def answer(self, key: str) -> Call | None:
        """Return the stored answer to a call; failures do not count."""
        row = self._db.execute(f"{_SELECT_CALLS} WHERE key = ? AND status != 'failed'", (key,)).fetchone()
        return None if row is None else Call(*row)

    def answered_by(self, model: str) -> bool:
        """Return whether the store has any verdict of this model."""
        row = self._db.execute("SELECT 1 FROM calls WHERE model = ? AND status = 'ok' LIMIT 1", (model,))
        return row.fetchone() is not None

    def calls(self) -> list[Call]:
        """Return every call, failures included, in the order in which they ended."""
        return [Call(*row) for row in self._db.execute(f"{_SELECT_CALLS} ORDER BY id")]

    def add_call(self, call: Call) -> None:
        """Store the record of a call; one without an answer will be asked again."""
        marks = ", ".join("?" * len(_COLUMNS))
        self._db.execute(f"INSERT INTO calls ({', '.join(_COLUMNS)}) VALUES ({marks})", astuple(call))

    # --- ledger -----------------------------------------------------------------------------------------

    def open_requests(
        self, max_usd: Sequence[tuple[str, float]], batch: str | None = None
    ) -> list[Reservation]:
        """Enter requests, as key and maximum cost, before they are sent."""
        started = now()
        insert = "INSERT INTO requests (key, batch, reserved, started) VALUES (?, ?, ?, ?)"
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            return [
                Reservation(self._db.execute(insert, (key, batch, usd, started)).lastrowid, usd)
                for key, usd in max_usd
            ]

    def settle(self, request: Reservation, usd: float, outcome: str, call: Call | None = None) -> None:
        """Enter the actual cost of a request and, in the same commit, its answer.

        Raises RuntimeError for a request that is settled already, whose cost would be booked twice.
        """
        update = "UPDATE requests SET usd = ?, outcome = ? WHERE id = ? AND usd IS NULL"
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            if self._db.execute(update, (usd, outcome, request.number)).rowcount != 1:
                raise RuntimeError(f"request {request.number} of {self.path} is settled already")
            if call is not None:
                self.add_call(call)

    def forget_request(self, request: Reservation) -> None:
        """Delete a request that was never sent."""
        self._db.execute("DELETE FROM requests WHERE id = ? AND usd IS NULL", (request.number,))

    def open_requests_of(self, batch: str) -> dict[str, Reservation]:
        """Return the requests of a batch that are not settled, by key."""
        select = "SELECT key, id, reserved FROM requests WHERE batch = ? AND usd IS NULL"
        return {key: Reservation(number, usd) for key, number, usd in self._db.execute(select, (batch,))}

    def ledger(self) -> Ledger:
        """Sum all requests, those of earlier runs included."""
        row = self._db.execute(
            "SELECT count(*), total(coalesce(usd, reserved)), count(*) - count(usd), "
            "total(CASE WHEN usd IS NULL THEN reserved END) FROM requests"
        ).fetchone()
        return Ledger(*row)

    # --- batches and facts ------------------------------------------------------------------------------

    def add_batch(self, name: str, requests: Sequence[tuple[str, int, dict[str, Any]]]) -> None:
        """Enter a batch before it is submitted: our name, and its requests as key, sample and body."""
        row = (name, json.dumps(list(requests)), now())
        self._db.execute("INSERT INTO batches VALUES (?, NULL, 'open', ?, ?)", row)

    def update_batch(self, name: str, batch_id: str | None, state: str) -> None:
        """Update a batch: the API's id, and its state, which is "open" while answers are pending."""
        self._db.execute("UPDATE batches SET id = ?, state = ? WHERE name = ?", (batch_id, state, name))

    def open_batches(self) -> list[tuple[str, str | None, list[tuple[str, int, dict[str, Any]]]]]:
        """Return (name, id, requests) of the batches that have not been merged."""
        rows = self._db.execute(
            "SELECT name, id, requests FROM batches WHERE state = 'open' ORDER BY started"
        )
        return [(name, batch_id, json.loads(requests)) for name, batch_id, requests in rows.fetchall()]

    def put_fact(self, name: str, value: Any) -> None:
        """Store a JSON value under a name."""
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def fact(self, name: str) -> Any:
        """Return the value under a name, None if there is none."""
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])
