"""What probes found out about a model, kept for as long as the model lives."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_ANSWERS: WeakKeyDictionary[nn.Module, dict[Hashable, Any]] = WeakKeyDictionary()


def answers_of(model: nn.Module) -> dict[Hashable, Any]:
    """Return the answers about this object by question, for a probe to look its own up and to add it."""
    return _ANSWERS.setdefault(model, {})
