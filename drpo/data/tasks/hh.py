"""Anthropic's helpful and harmless dialogues (hh-rlhf): pairs of whole dialogues, from files or the hub."""

from __future__ import annotations

from drpo.data.chat import ChatTemplate
from drpo.data.dialogue import parse_turns, split_dialogue
from drpo.data.files import Row, Table, convert_rows
from drpo.data.records import BadRows, DataError, Record, RowError, require_different, require_text
from drpo.data.tasks.task import Task


def split_pair(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Return prompt, chosen and rejected response of two dialogues; RowError unless they share the prompt."""
    prompt, chosen = split_dialogue(chosen)
    other_prompt, rejected = split_dialogue(rejected)
    if prompt != other_prompt:
        raise RowError("prompts differ", f"{prompt[-60:]!r} and {other_prompt[-60:]!r}")
    require_different(chosen, rejected)
    return prompt, chosen, rejected


def hh_record(row: Row, chat: ChatTemplate | None) -> Record:
    """Convert a pair of dialogues to a record; with `chat`, its turns go through the chat template."""
    extra = dict(row.values)
    prompt, chosen, rejected = split_pair(
        require_text(extra.pop("chosen", None), "chosen"),
        require_text(extra.pop("rejected", None), "rejected"),
    )
    rendered = None
    if chat is not None:
        responses = [chosen.strip(), rejected.strip()]
        prompt, (chosen, rejected), rendered = chat.convert(parse_turns(prompt), responses, prompt)
    return Record(prompt, chosen=chosen, rejected=rejected, origin=row.origin, extra=extra, chat=rendered)


def hh_records(table: Table, bad: BadRows, chat: ChatTemplate | None = None) -> list[Record]:
    """Convert a table of dialogue pairs to records; DataError when a column is missing."""
    absent = {"chosen", "rejected"}.difference(table.columns)
    if absent:
        raise DataError(
            f"{table.name} is not hh-rlhf data: no column {' or '.join(sorted(absent))}; "
            f"its columns are: {', '.join(table.columns)}"
        )
    return convert_rows(table, bad, lambda row: hh_record(row, chat))


TASK = Task(
    "hh",
    read=lambda table, bad, config, chat: (hh_records(table, bad, chat), []),
    subset_is_folder=True,
    truncation="left",
)
