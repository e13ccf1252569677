"""The file judgments.jsonl, a line for each call or for each verdict of an uncalled judge, and its cost."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from drpo.data.records import DataError
from drpo.jsonl import lines_of, write_whole
from drpo.run.stopped import RunStopped
from eval.judging.openai.store import Call, Ledger
from eval.judging.verdict import Verdict

Result = TypeVar("Result")

NUM_REASONS = 5
"Reasons for missing verdicts that are printed."
_OF_CALL = (
    "key sample backend text refusal finish_reason model model_returned fingerprint request_id prompt_tokens "
    "cached_tokens cache_write_tokens completion_tokens reasoning_tokens cost num_attempts latency time"
).split()


def tool_versions() -> str:
    """Return the versions of the packages that make a judgments file."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("drpo", "openai"))


@contextmanager
def disk_trouble_explained(folder: Path) -> Iterator[None]:
    """Raise RunStopped for a full disk or a folder that may not be written."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise RunStopped(
            f"the run cannot write its files ({error}). Answers that the store took are kept; make room in {folder}, "
            "and the same command goes on from there"
        ) from error


def judgment_rows(
    verdict: Verdict, calls: Mapping[str, Call], common: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Make the lines of a verdict: the last one decides (`final`), earlier ones are unreadable answers."""
    values = asdict(verdict)
    keys = values.pop("keys")
    rows = []
    for key in keys[:-1]:
        call = calls[key]
        earlier = {"status": call.status, "winner": None, "detail": call.detail, "final": False}
        rows.append({**values, **earlier, **_of_call(call), **common})
    last = _of_call(calls[keys[-1]]) if keys else {}
    return [*rows, {**values, "final": True, **last, **common}]


def _of_call(call: Call) -> dict[str, Any]:
    return {name: getattr(call, name) for name in _OF_CALL}


def write_judgments(
    path: Path, verdicts: Sequence[Verdict], calls: Sequence[Call], common: Mapping[str, Any]
) -> None:
    """Write the lines of all verdicts."""
    by_key = {call.key: call for call in calls}  # the latest of each
    rows = [row for verdict in verdicts for row in judgment_rows(verdict, by_key, common)]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_answers(path: Path) -> dict[tuple[str, int, str], str]:
    """Read the judge's answers by (prompt_id, seed, order), leaving out questions without one.

    Raises DataError as `read_verdicts` does.
    """
    rows = _read_final(path, lambda row: ((row["prompt_id"], row["seed"], row["order"]), row.get("text")))
    return {key: text for key, text in rows if text is not None}


def read_verdicts(path: Path | str) -> list[Verdict]:
    """Read the verdicts of a judgments file. Raises DataError if it is missing or a line is no verdict."""
    return _read_final(Path(path), _verdict)


def _verdict(row: Mapping[str, Any]) -> Verdict:
    values = {field.name: row[field.name] for field in fields(Verdict) if field.name != "keys"}
    for name in ("suspicions_a", "suspicions_b", "scores"):
        values[name] = None if values[name] is None else tuple(values[name])
    return Verdict(**values, keys=(row["key"],) if "key" in row else ())


def _read_final(path: Path, read: Callable[[dict[str, Any]], Result]) -> list[Result]:
    """Apply `read` to the final line of each verdict. Raises DataError that names file and line where it fails."""
    if not path.is_file():
        raise DataError(f"no judgments file {path}")
    results = []
    for number, line in lines_of(path.read_bytes()):
        try:
            row = json.loads(line)
            if row["final"]:
                results.append(read(row))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path}:{number} is not a judgment ({type(error).__name__}: {error})") from None
    return results


def reasons(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Count the reasons for missing verdicts by status and detail, most frequent first."""
    counts = Counter((v.status, v.detail) for v in verdicts if v.status != "ok")
    return [{"status": s, "detail": detail, "count": count} for (s, detail), count in counts.most_common()]


def reasons_text(counts: Sequence[Mapping[str, Any]]) -> str:
    """Format the most frequent of `reasons`, one line each."""
    lines = [f"  {row['count']} {row['status']}: {row['detail']}" for row in counts[:NUM_REASONS]]
    if num_others := sum(row["count"] for row in counts[NUM_REASONS:]):
        lines.append(f"  {num_others} for other reasons; judgments.jsonl has them")
    return "\n".join(lines)


# --- tokens and dollars ---------------------------------------------------------------------------------


def tokens_and_cost(calls: Sequence[Call]) -> dict[str, Any]:
    """Sum calls by kind of token; `cost` is None where no call has one."""
    kinds = ("prompt_tokens", "cached_tokens", "cache_write_tokens", "completion_tokens", "reasoning_tokens")
    sums = {kind: sum(getattr(call, kind) or 0 for call in calls) for kind in kinds}
    costs = [call.cost for call in calls if call.cost is not None]
    return {"calls": len(calls), **sums, "cost": sum(costs) if costs else None}


def spent_text(spent: Mapping[str, Any], ledger: Ledger) -> str:
    """Format the sums of `tokens_and_cost` for a run, and those of the whole store, on two lines."""
    cost = "price unknown" if spent["cost"] is None else f"${spent['cost']:.4f}"
    paid = "" if spent["cost"] is None else f", ${ledger.usd:.4f} at most"
    return (
        f"all answers used: {spent['calls']} calls, {spent['prompt_tokens']:,} prompt tokens "
        f"({spent['cached_tokens']:,} cached), "
        f"{spent['completion_tokens']:,} answer tokens ({spent['reasoning_tokens']:,} of thought), {cost}\n"
        f"the store in all: {ledger.num_requests} requests{paid}"
        + (f", {ledger.num_open} of them without an end" if ledger.num_open else "")
    )
