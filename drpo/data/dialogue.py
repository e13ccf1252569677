"""Dialogues as one text with "\\n\\nHuman:" and "\\n\\nAssistant:" turns, the format of hh-rlhf."""

from __future__ import annotations

import re
from collections.abc import Sequence

from drpo.data.records import Message, RowError, require_text

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
SYSTEM = "\n\nSystem:"
ROLES = {HUMAN: "user", ASSISTANT: "assistant"}


def split_dialogue(text: str) -> tuple[str, str]:
    """Split a dialogue after the last assistant marker, so that prompt + response = text.

    The longest common prefix of two dialogues would be wrong: it puts "I can" of "I can" / "I cannot" into the
    prompt. Raises RowError when no assistant turn ends the dialogue, or when that turn is empty.
    """
    before, marker, response = text.rpartition(ASSISTANT)
    if not marker:
        raise RowError("no assistant turn", repr(text[-60:]))
    if HUMAN in response:
        raise RowError("no assistant turn", "the dialogue ends with a human turn")
    return before + marker, require_text(response, "the last assistant turn")


def parse_turns(prompt: str) -> list[dict[str, str]]:
    """Parse the turns of a prompt into chat messages, without the empty assistant turn at its end."""
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
    """Write the turns of a prompt as the text of a dialogue; a single question is its own text."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "".join(f"{_marker(m['role'])} {m['content']}" for m in messages) + ASSISTANT


def parse_prompt(text: str) -> list[dict[str, str]]:
    """Invert `dialogue`: return the turns of a text; one without a human turn is one question."""
    before, marker, _ = text.partition(HUMAN)
    system = before.strip().removeprefix(f"{SYSTEM.strip()} ") if before.startswith(SYSTEM) else None
    if not marker or (before.strip() and system is None) or not text.endswith(ASSISTANT):
        return [{"role": "user", "content": text}]
    opening = [] if system is None else [{"role": "system", "content": system}]
    return opening + parse_turns(text[len(before) :])


def _marker(role: str) -> str:
    """Return the marker before a turn: that of hh-rlhf for its two roles, the role's own name for others."""
    return {role: marker for marker, role in ROLES.items()}.get(role, f"\n\n{role.capitalize()}:")
