"""Anthropic's helpful and harmless dialogues (hh-rlhf): pairs of whole dialogues, from the hub or local
JSONL files."""

from __future__ import annotations

import re

from drpo.data.chat import ChatTemplate
from drpo.data.files import Row, Table, convert_rows
from drpo.data.records import BadRows, DataError, Record, RowError, require_different, require_text

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
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
    if chat is not None:
        prompt, (chosen, rejected) = chat.render(parse_turns(prompt), [chosen.strip(), rejected.strip()])
    return Record(prompt, chosen=chosen, rejected=rejected, origin=row.origin, extra=extra)


def hh_records(table: Table, bad: BadRows, chat: ChatTemplate | None = None) -> list[Record]:
    """The records of a table of dialogue pairs; DataError when a column is missing."""
    missing = {"chosen", "rejected"}.difference(table.columns)
    if missing:
        raise DataError(
            f"{table.name} is not hh-rlhf data: no column {' or '.join(sorted(missing))}; "
            f"its columns are: {', '.join(table.columns)}"
        )
    return convert_rows(table, bad, lambda row: hh_record(row, chat))
