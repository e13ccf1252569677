"""Own data in TRL's dataset conventions, and `responses` + `scores` for ranked data.

The columns prompt, completion, chosen, rejected and messages contain text or conversations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from drpo.config import key
from drpo.data.chat import ChatTemplate, is_conversation, require_messages, split_conversation
from drpo.data.dialogue import ASSISTANT, HUMAN, parse_turns, split_dialogue
from drpo.data.files import Row, Table, convert_rows
from drpo.data.records import (
    BadRows,
    DataError,
    Record,
    RowError,
    require_different,
    require_scores,
    require_text,
)
from drpo.data.tasks.task import Task

TEXT_FIELDS = ("prompt", "completion", "chosen", "rejected", "messages", "responses", "scores")
EXTRA_FIELDS = ("label", "chosen_score", "rejected_score", "chosen_relevance", "rejected_relevance")
"Facts on responses: kept in `extra`, and checked where they are used."
FIELDS = (*TEXT_FIELDS, *EXTRA_FIELDS)
RESPONSE_FIELDS = ("completion", "chosen", "rejected")
CONVERSATION_FIELDS = ("prompt", "messages", *RESPONSE_FIELDS)
JSON_FIELDS = ("messages", "responses", "scores", *EXTRA_FIELDS[1:])
PROMPT_SOURCES = ("prompt", "messages", "chosen")


def own_records(
    table: Table, bad: BadRows, columns: Mapping[str, str], chat: ChatTemplate | None = None
) -> list[Record]:
    """Convert a table to records; the column `columns[field]` (default: `field`) contains the field.

    Raises DataError, naming the columns that are there, when a mapped column or every source of prompts is missing.
    """
    for field, column in columns.items():
        if column not in table.columns:
            raise DataError(
                f"no column {column!r} ({key('columns')}.{field}) in {table.name}; "
                f"its columns are: {', '.join(table.columns)}"
            )
    if not any(columns.get(field, field) in table.columns for field in PROMPT_SOURCES):
        raise DataError(
            f"no column {', '.join(PROMPT_SOURCES[:-1])} or {PROMPT_SOURCES[-1]} in {table.name}; "
            f"its columns are: {', '.join(table.columns)}. Name yours with {key('columns.prompt')}=..."
        )
    return convert_rows(table, bad, lambda row: own_record(row, columns, chat))


def own_record(row: Row, columns: Mapping[str, str], chat: ChatTemplate | None) -> Record:
    """Convert one row to a record.

    A response column may contain a text, an assistant message, or a whole dialogue that ends with the assistant's
    turn (implicit prompt: a conversation, or text with "\\n\\nAssistant:" turns): the turns before it are the
    prompt, and all response columns must agree on it. `messages` is a completion with implicit prompt. With `chat`,
    a text prompt is one user message, and whitespace around responses is left to the template.
    """
    extra = dict(row.values)
    fields = {field: _parse(field, extra.pop(columns.get(field, field), None)) for field in FIELDS}
    extra |= {name: fields[name] for name in EXTRA_FIELDS if fields[name] is not None}
    if fields["completion"] is not None and fields["messages"] is not None:
        extra["messages"] = fields["messages"]
    elif fields["messages"] is not None:
        if not is_conversation(fields["messages"]):
            raise RowError("wrong type", "messages is not a list of messages with a role each")
        fields["completion"] = fields["messages"]
    if isinstance(fields["prompt"], str):
        require_text(fields["prompt"], "prompt")
    implicit = fields["prompt"] is None

    ranked = _ranked(fields["responses"], fields["scores"])
    names = [name for name in RESPONSE_FIELDS if fields[name] is not None]
    contexts, texts = [], []
    for name, value in [*((name, fields[name]) for name in names), *(("responses", text) for text in ranked)]:
        context, text = _split_response(name, value, implicit)
        contexts.append(context)
        texts.append(text.strip() if chat is not None else text)
    prompt = _agree(fields["prompt"], contexts)
    rendered = None
    if chat is not None:
        turns, source = prompt, None
        if isinstance(prompt, str):
            turns = parse_turns(prompt) if implicit else [{"role": "user", "content": prompt}]
            source = prompt
        prompt, texts, rendered = chat.convert(turns, texts, source)
    elif not isinstance(prompt, str):
        raise DataError(f"{row.origin} holds a conversation: set {key('chat_template')}=true to render it")

    by_name = dict(zip(names, texts, strict=False))
    require_different(by_name.get("chosen"), by_name.get("rejected"))
    return Record(
        prompt,
        **by_name,
        responses=tuple(texts[len(names) :]),
        scores=require_scores(fields["scores"], "scores", len(ranked)) if ranked else (),
        origin=row.origin,
        extra={name: _json_value(value) for name, value in extra.items()},
        chat=rendered,
    )


def _parse(field: str, value: Any) -> Any:
    """Parse a value; a CSV file has only text, so lists and numbers are JSON there and a label true or false."""
    if field == "label" and isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower(), value)
    if field in JSON_FIELDS and isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowError("invalid JSON", f"{field}: {error.msg}") from None
    if field == "responses" and isinstance(value, list):
        return [_messages(field, response) for response in value]
    return _messages(field, value) if field in CONVERSATION_FIELDS else value


def _messages(field: str, value: Any) -> Any:
    """Check and return a list of messages; return any other value unchanged."""
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return require_messages(value, field)
    return value


def _ranked(responses: Any, scores: Any) -> list:
    if responses is None and scores is None:
        return []
    if responses is None or scores is None:
        raise RowError("missing field", "one of responses and scores is there, the other is not")
    if not isinstance(responses, list):
        raise RowError("wrong type", f"responses is {type(responses).__name__}, not a list")
    if not responses:
        raise RowError("empty text", "responses is an empty list")
    return responses


def _split_response(name: str, value: Any, implicit: bool) -> tuple[list | str | None, str]:
    """Split a response column into the part that belongs to the prompt (None: nothing) and the response."""
    if is_conversation(value):
        context, text = split_conversation(value)
        return context or None, text
    text = require_text(value, name)
    if not implicit:
        return None, text
    if HUMAN not in text and ASSISTANT not in text:
        raise RowError("missing field", f"no prompt, and {name} is no dialogue with {ASSISTANT!r} turns")
    return split_dialogue(text)


def _agree(prompt: Any, contexts: list[list | str | None]) -> Any:
    """Return the one prompt of the prompt column and the turns before the responses; RowError if they differ."""
    turns = [context for context in contexts if context is not None]
    if any(context != turns[0] for context in turns):
        raise RowError("prompts differ", "the responses answer different dialogues")
    if not turns:
        if prompt is None:
            raise RowError("missing field", "no prompt")
        if not isinstance(prompt, str) and not is_conversation(prompt):
            raise RowError("wrong type", f"prompt is {type(prompt).__name__}, not text or a list of messages")
        return prompt
    # Some data sets (UltraFeedback) repeat one turn of the conversation as the text of the prompt column.
    repeats = isinstance(prompt, str) and any(message.get("content") == prompt for message in turns[0])
    if prompt is not None and prompt != turns[0] and not repeats:
        raise RowError("prompts differ", "the prompt column and the turns before the response")
    return turns[0]


def _json_value(value: Any) -> Any:
    """Return a JSON value; others, such as dates, become text."""
    return value if isinstance(value, str | int | float | list | dict | None) else str(value)


TASK = Task(
    "own",
    read=lambda table, bad, config, chat: (own_records(table, bad, config.columns, chat), []),
    columns=FIELDS,
)
