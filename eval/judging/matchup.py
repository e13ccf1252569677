"""Matchups: two systems' responses to the same prompt, for a judge to choose between."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from drpo.data.records import BadRows, DataError, Message
from eval.completions.rows import CompletionRow

Order = Literal["ab", "ba"]
"ab: system a's response is shown first; ba: system b's."


@dataclass(frozen=True, slots=True)
class Matchup:
    """One response of system a and one of system b to the same prompt."""

    prompt_id: str
    prompt: str
    system_a: str
    response_a: str
    system_b: str
    response_b: str
    seed: int = 0
    "Seed of system a's response: distinguishes the matchups of several responses to one prompt."
    ended_a: bool = True
    ended_b: bool = True
    reference: str | None = None
    "The dataset's own response, not shown to judges that read texts."
    messages: tuple[Message, ...] | None = field(default=None, compare=False)
    "The chat turns of the prompt, for a judge with a chat template; None for those parsed from the text."

    def shown(self, order: Order) -> tuple[str, str]:
        """Return the two responses as they are shown: first, second."""
        pair = (self.response_a, self.response_b)
        return pair if order == "ab" else pair[::-1]


@dataclass(frozen=True, slots=True)
class Question:
    """A matchup in one order, as asked of a judge."""

    matchup: Matchup
    order: Order


def pair_up(completions: Sequence[CompletionRow], system: str, baseline: str) -> list[Matchup]:
    """Match every response of `system` (as a) with the baseline's (as b) to the same prompt, in file order.

    Where the baseline has one response to a prompt, it meets all of the system's; where it has several, those of
    the same seed meet. Raises DataError when a system is missing, the two are the same, or prompts (counted)
    lack a response of one of them.
    """
    if system == baseline:
        raise DataError(f"system and baseline are both {system!r}; a comparison needs two")
    systems = sorted({row.system for row in completions})
    for name in (system, baseline):
        if name not in systems:
            raise DataError(f"no responses of system {name!r}; there are: {', '.join(systems)}")
    of_baseline: dict[str, dict[int, CompletionRow]] = {}
    for row in completions:
        if row.system == baseline:
            of_baseline.setdefault(row.prompt_id, {})[row.seed] = row

    bad, matchups = BadRows("prompts"), []
    rows = [row for row in completions if row.system == system]
    for row in rows:
        rivals = of_baseline.get(row.prompt_id, {})
        rival = next(iter(rivals.values())) if len(rivals) == 1 else rivals.get(row.seed)
        if rival is None:
            kind = f"no response of {baseline}" if not rivals else f"no response of {baseline} with this seed"
            bad.add(kind, f"prompt {row.prompt_id}, seed {row.seed}")
            continue
        matchups.append(
            Matchup(
                row.prompt_id,
                row.prompt,
                system,
                row.response,
                baseline,
                rival.response,
                row.seed,
                row.ended,
                rival.ended,
                reference=row.reference if row.reference is not None else rival.reference,
                messages=row.messages if row.messages is not None else rival.messages,
            )
        )
    for prompt_id in sorted(of_baseline.keys() - {row.prompt_id for row in rows}):
        bad.add(f"no response of {system}", f"prompt {prompt_id}")
    if bad:
        raise DataError(
            f"{system} and {baseline} were not given the same prompts:\n{bad.summary()}\n"
            "Complete the files, or leave these prompts out of both."
        )
    return matchups


def first_prompts(matchups: Sequence[Matchup], num_prompts: int) -> list[Matchup]:
    """Select the matchups of `num_prompts` prompts by the hashes of the prompts.

    The choice is independent of the order of the file, and a smaller one is a subset of a larger one.
    """
    selected_ids = set(sorted({matchup.prompt_id for matchup in matchups})[:num_prompts])
    return [matchup for matchup in matchups if matchup.prompt_id in selected_ids]


def questions_of(matchups: Sequence[Matchup], orders: Literal["both", "one"], seed: int) -> list[Question]:
    """Ask each matchup in both orders, or in one that is drawn for it by (seed, matchup)."""
    if orders == "both":
        return [Question(matchup, order) for matchup in matchups for order in ("ab", "ba")]
    return [Question(matchup, _drawn_order(matchup, seed)) for matchup in matchups]


def _drawn_order(matchup: Matchup, seed: int) -> Order:
    name = f"{seed}/{matchup.prompt_id}/{matchup.system_a}/{matchup.system_b}/{matchup.seed}"
    return "ab" if hashlib.sha256(name.encode()).digest()[0] % 2 else "ba"
