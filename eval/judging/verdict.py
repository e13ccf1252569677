"""Verdicts: a judge's answer on a matchup in one order, and both orders combined.

A failure is never counted as data. A verdict has a winner if and only if its status is "ok", and a matchup has a
score if and only if all of its verdicts have a winner (or a tie).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eval.judging.matchup import Order, Question

Status = Literal["ok", "refused", "malformed", "truncated", "failed"]
"""ok: a verdict was read. refused: the judge, or a filter before or after it, would not answer. malformed: it answered
something else, every time. truncated: the answer was cut at its length limit. failed: there was no answer."""
Winner = Literal["a", "b", "tie"]
Slot = Literal["first", "second", "tie"]

_SHARE: dict[Winner | None, float] = {"a": 1.0, "tie": 0.5, "b": 0.0}
"Share of the win that goes to system a."
STATUSES: tuple[Status, ...] = ("ok", "refused", "malformed", "truncated", "failed")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one question; `winner` refers to the systems, not to the order shown."""

    prompt_id: str
    system_a: str
    system_b: str
    seed: int
    order: Order
    status: Status
    winner: Winner | None
    length_a: int
    "Characters of system a's response."
    length_b: int
    detail: str = ""
    "Why there is no winner: the error message."
    suspicions_a: tuple[str, ...] = ()
    "Signs in system a's response of an attempt to sway the judge. They change no verdict."
    suspicions_b: tuple[str, ...] = ()
    scores: tuple[float, float] | None = None
    "For a judge that scores: its scores of response a and response b."
    keys: tuple[str, ...] = ()
    "For a judge that is called: its calls in the store, of which the last one decides."

    def __post_init__(self) -> None:
        if (self.status == "ok") != (self.winner is not None):
            raise ValueError(f"a verdict with status {self.status} cannot have the winner {self.winner}")

    @property
    def first_slot_won(self) -> float | None:
        """1 if the response shown first won, 0 if the other did, 0.5 for a tie, None without a verdict."""
        share = _SHARE.get(self.winner)
        return share if share is None or self.order == "ab" else 1.0 - share


def winner_of(slot: Slot, order: Order) -> Winner:
    """Return the system whose response was shown in a slot."""
    if slot == "tie":
        return "tie"
    return "a" if (slot == "first") == (order == "ab") else "b"


def verdict_on(question: Question, status: Status, winner: Winner | None, **values: Any) -> Verdict:
    """Make the verdict on a question from its matchup and order; `values` are further fields of the verdict."""
    matchup = question.matchup
    return Verdict(
        matchup.prompt_id,
        matchup.system_a,
        matchup.system_b,
        matchup.seed,
        question.order,
        status,
        winner,
        len(matchup.response_a),
        len(matchup.response_b),
        **values,
    )


# --- both orders together -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Judgment:
    """The verdicts on one matchup, combined."""

    prompt_id: str
    system_a: str
    system_b: str
    seed: int
    score: float | None
    "Share of the win that goes to system a: 1, 0.75, 0.5, 0.25 or 0; None where it is undecided."
    consistent: bool | None
    "Whether both orders have the same outcome; None unless both have one."
    first_slot_wins: tuple[float | None, ...]
    "For each verdict (ab, then ba): 1 if the response that was shown first won, 0.5 for a tie, None without one."
    statuses: tuple[Status, ...]
    length_a: int
    length_b: int
    suspected_a: bool
    suspected_b: bool


HalfTie = Literal["half", "tie"]


def combine_all(
    verdicts: Iterable[Verdict], half_tie: HalfTie = "half", orders: Literal["both", "one"] = "both"
) -> list[Judgment]:
    """Combine the verdicts on each matchup, in the order of their first verdicts; `orders` were to be asked.

        both orders agree          1, 0.5 or 0           consistent
        one slot wins both times   0.5                   inconsistent: the slot decided, not the response
        a win and a tie            "half": 0.75 or 0.25, "tie": 0.5; inconsistent
        one of them has no winner, or was not asked yet: None, as it is never imputed from the other

    Raises ValueError for two verdicts on one order of a matchup, or two where one was to be asked.
    """
    groups: dict[tuple, list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault(_matchup_key(verdict), []).append(verdict)
    return [_combine(group, half_tie, 2 if orders == "both" else 1) for group in groups.values()]


def _combine(verdicts: Sequence[Verdict], half_tie: HalfTie, num_orders: int) -> Judgment:
    """Combine the verdicts on one matchup."""
    orders = [v.order for v in verdicts]
    if len(set(orders)) < len(orders):
        raise ValueError(f"prompt {verdicts[0].prompt_id} has two verdicts on one order: {orders}")
    if len(orders) > num_orders:
        raise ValueError(f"prompt {verdicts[0].prompt_id} has verdicts on {orders} where one order was asked")
    ordered = sorted(verdicts, key=lambda v: v.order)
    winners = {v.winner for v in ordered}
    score = consistent = None
    if None not in winners and len(ordered) == num_orders:
        score = sum(_SHARE[v.winner] for v in ordered) / num_orders
        if "tie" in winners and half_tie == "tie":
            score = 0.5
        consistent = len(winners) == 1 if num_orders == 2 else None
    first = ordered[0]
    return Judgment(
        *_matchup_key(first),
        score,
        consistent,
        tuple(v.first_slot_won for v in ordered),
        tuple(v.status for v in ordered),
        first.length_a,
        first.length_b,
        bool(first.suspicions_a),
        bool(first.suspicions_b),
    )


def _matchup_key(verdict: Verdict) -> tuple[str, str, str, int]:
    return verdict.prompt_id, verdict.system_a, verdict.system_b, verdict.seed
