"""What probes found out about a model, kept for as long as the model lives."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

Answer = TypeVar("Answer")

_ANSWERS: WeakKeyDictionary[nn.Module, dict[Hashable, Any]] = WeakKeyDictionary()


def answers_of(model: nn.Module) -> dict[Hashable, Any]:
    """Return the answers about this object by question, for a probe to look its own up and to add it."""
    return _ANSWERS.setdefault(model, {})


def answer(model: nn.Module, question: Hashable, find: Callable[[], Answer]) -> Answer:
    """Return the answer to a question about this object, which `find` gives where it is not known yet."""
    answers = answers_of(model)
    if question not in answers:
        answers[question] = find()
    return answers[question]
