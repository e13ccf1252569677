"""Anthropic's helpful and harmless dialogues (hh-rlhf): pairs of whole dialogues, from the hub or local
JSONL files."""

from __future__ import annotations

import re
from collections.abc import Sequence

from drpo.data.chat import ChatTemplate
from drpo.data.files import Row, Table, convert_rows
from drpo.data.records import (
    BadRows,
    DataError,
    Message,
    Record,
    RowError,
    require_different,
    require_text,
)

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
SYSTEM = "\n\nSystem:"
ROLES = {HUMAN: "user", ASSISTANT: "assistant"}


def split_dialogue(text: str) -> tuple[str, str]:
    """Cut a dialogue after the last assistant marker, so that prompt + response = text.

    Never at the longest common prefix of two dialogues: that would put "I can" of "I can" / "I cannot" into
    the prompt. Raises RowError when no assistant turn ends the dialogue, or when that turn is empty.
    """
    before, marker, response = text.rpartition(ASSISTANT)
    if not marker:
        raise RowError("no assistant turn", repr(text[-60:]))
    if HUMAN in response:
        raise RowError("no assistant turn", "the dialogue ends with a human turn")
    return before + marker, require_text(response, "the last assistant turn")


def parse_turns(prompt: str) -> list[dict[str, str]]:
    """The turns of a prompt as chat messages; the empty assistant turn at its end, to be written, is left
    out."""
    opening, *parts = re.split(f"({HUMAN}|{ASSISTANT})", prompt)
    if opening.strip():
        raise RowError("no human turn", f"the dialogue begins with {opening[:60]!r}")
    turns = [
        {"role": ROLES[marker], "content": text.strip()}
        for marker, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return turns


def dialogue(messages: Sequence[Message]) -> str:
    """The turns of a prompt as the text of a dialogue; a question by itself is its own text."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "".join(f"{_marker(m['role'])} {m['content']}" for m in messages) + ASSISTANT


def parse_prompt(text: str) -> list[dict[str, str]]:
    """The turns of `dialogue`: a text without a human turn is one question."""
    before, marker, _ = text.partition(HUMAN)
    system = before.strip().removeprefix(f"{SYSTEM.strip()} ") if before.startswith(SYSTEM) else None
    if not marker or (before.strip() and system is None) or not text.endswith(ASSISTANT):
        return [{"role": "user", "content": text}]
    opening = [] if system is None else [{"role": "system", "content": system}]
    return opening + parse_turns(text[len(before) :])


def _marker(role: str) -> str:
    """What stands before a turn: the roles of the data set by their names there, others by their own."""
    return {role: marker for marker, role in ROLES.items()}.get(role, f"\n\n{role.capitalize()}:")


def split_pair(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt, chosen and rejected response of two dialogues; RowError unless they share the prompt."""
    prompt, chosen = split_dialogue(chosen)
    other_prompt, rejected = split_dialogue(rejected)
    if prompt != other_prompt:
        raise RowError("prompts differ", f"{prompt[-60:]!r} and {other_prompt[-60:]!r}")
    require_different(chosen, rejected)
    return prompt, chosen, rejected


def hh_record(row: Row, chat: ChatTemplate | None) -> Record:
    """One pair of dialogues as a record; with `chat`, its turns go through the chat template."""
    extra = dict(row.values)
    prompt, chosen, rejected = split_pair(
        require_text(extra.pop("chosen", None), "chosen"),
        require_text(extra.pop("rejected", None), "rejected"),
    )
    rendered = None
    if chat is not None:
        turns, source = parse_turns(prompt), prompt
        prompt, (chosen, rejected) = chat.render(turns, [chosen.strip(), rejected.strip()])
        rendered = chat.chat(turns, source)
    return Record(prompt, chosen=chosen, rejected=rejected, origin=row.origin, extra=extra, chat=rendered)


def hh_records(table: Table, bad: BadRows, chat: ChatTemplate | None = None) -> list[Record]:
    """The records of a table of dialogue pairs; DataError when a column is missing."""
    missing = {"chosen", "rejected"}.difference(table.columns)
    if missing:
        raise DataError(
            f"{table.name} is not hh-rlhf data: no column {' or '.join(sorted(missing))}; "
            f"its columns are: {', '.join(table.columns)}"
        )
    return convert_rows(table, bad, lambda row: hh_record(row, chat))
