"""judgments.jsonl, one line for each call (or for each verdict of a judge that is not called), and its counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from drpo.data.records import DataError
from eval.judging.store import Call
from eval.judging.verdict import STATUSES, Judgment, Verdict

_TUPLES = ("suspicions_a", "suspicions_b", "scores", "keys")
_OF_CALL = (
    *(
        "key",
        "sample",
        "backend",
        "text",
        "refusal",
        "finish_reason",
        "model",
        "model_returned",
        "fingerprint",
    ),
    *("request_id", "prompt_tokens", "cached_tokens", "cache_write_tokens", "completion_tokens"),
    *("reasoning_tokens", "cost", "num_attempts", "latency", "time"),
)


def tool_versions() -> str:
    """What made a judgments file."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("drpo", "openai"))


def judgment_rows(
    verdict: Verdict, calls: Mapping[str, Call], common: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The lines of one verdict. The last one decides (`final`); earlier ones are answers that could not be read."""
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
    """Write all lines at once: a file is there in full or as it was before."""
    by_key = {call.key: call for call in calls}  # the latest of each
    rows = [row for verdict in verdicts for row in judgment_rows(verdict, by_key, common)]
    replacement = path.with_suffix(".tmp")
    replacement.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    replacement.replace(path)


def read_judgments(path: Path | str) -> list[Verdict]:
    """The verdicts of a judgments file. Raises DataError for a missing file or a line that is no judgment."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no judgments file {path}")
    names = [field.name for field in fields(Verdict) if field.name != "keys"]
    verdicts = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            if not row["final"]:
                continue
            values = {name: row[name] for name in names}
            for name in set(_TUPLES) & set(names):
                values[name] = None if values[name] is None else tuple(values[name])
            verdicts.append(Verdict(**values, keys=(row["key"],) if "key" in row else ()))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number} is not a judgment ({type(error).__name__}: {error})") from None
    return verdicts


# --- counts ---------------------------------------------------------------------------------------------


def summarise(judgments: Sequence[Judgment], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Counts and naive rates. `rate` is over decided comparisons; `all_lose` and `all_win` bound it by counting every
    undecided one for b, or for a. Shares of nothing are None."""
    scores = [judgment.score for judgment in judgments if judgment.score is not None]
    num_undecided = len(judgments) - len(scores)
    slots = [won for judgment in judgments for won in judgment.first_slot_wins if won is not None]
    consistent = [judgment.consistent for judgment in judgments if judgment.consistent is not None]
    statuses = Counter(verdict.status for verdict in verdicts)
    return {
        "num_comparisons": len(judgments),
        "wins": sum(score > 0.5 for score in scores),
        "ties": sum(score == 0.5 for score in scores),
        "losses": sum(score < 0.5 for score in scores),
        "undecided": num_undecided,
        "rate": _share(sum(scores), len(scores)),
        "all_lose": _share(sum(scores), len(judgments)),
        "all_win": _share(sum(scores) + num_undecided, len(judgments)),
        "consistent": _share(sum(consistent), len(consistent)),
        "first_slot_wins": _share(sum(slots), len(slots)),
        "statuses": {status: statuses[status] for status in STATUSES},
        "suspected": {
            side: {
                "responses": sum(getattr(j, f"suspected_{side}") for j in judgments),
                "score": sum(
                    (j.score if side == "a" else 1 - j.score)
                    for j in judgments
                    if getattr(j, f"suspected_{side}") and j.score is not None
                ),
            }
            for side in ("a", "b")
        },
    }


def tokens_and_cost(calls: Sequence[Call]) -> dict[str, Any]:
    """Sums over calls by kind of token; `cost` is None where no call has one."""
    kinds = ("prompt_tokens", "cached_tokens", "cache_write_tokens", "completion_tokens", "reasoning_tokens")
    sums = {kind: sum(getattr(call, kind) or 0 for call in calls) for kind in kinds}
    costs = [call.cost for call in calls if call.cost is not None]
    return {"calls": len(calls), **sums, "cost": sum(costs) if costs else None}


def summary_text(summary: Mapping[str, Any], system: str, baseline: str) -> str:
    """The counts on a few lines."""
    lines = [
        f"{system} against {baseline}: {summary['num_comparisons']} comparisons, "
        f"{summary['wins']} won, {summary['ties']} tied, {summary['losses']} lost, "
        f"{summary['undecided']} undecided",
        f"naive rate {_percent(summary['rate'])} of the decided ones "
        f"(bounds: {_percent(summary['all_lose'])} if {system} lost all others, "
        f"{_percent(summary['all_win'])} if it won them)",
        f"same verdict in both orders: {_percent(summary['consistent'])}; "
        f"first slot wins: {_percent(summary['first_slot_wins'])}",
        "verdicts: " + ", ".join(f"{count} {status}" for status, count in summary["statuses"].items()),
    ]
    for side, name in (("a", system), ("b", baseline)):
        suspected = summary["suspected"][side]
        if suspected["responses"]:
            lines.append(
                f"{suspected['responses']} responses of {name} look like attempts to sway the judge; "
                f"they won {suspected['score']:g}"
            )
    spent = summary.get("spent")
    if spent is not None:
        cost = "price unknown" if spent["cost"] is None else f"${spent['cost']:.4f}"
        lines.append(
            f"{spent['calls']} calls: {spent['prompt_tokens']:,} prompt tokens ({spent['cached_tokens']:,} cached), "
            f"{spent['completion_tokens']:,} answer tokens ({spent['reasoning_tokens']:,} of thought), {cost}"
        )
    store = summary.get("store")
    if store is not None:
        lines.append(
            f"the store in all: {store['num_requests']} requests, ${store['usd']:.4f} at most"
            + (f", {store['num_open']} of them without an end" if store["num_open"] else "")
        )
    return "\n".join(lines)


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
