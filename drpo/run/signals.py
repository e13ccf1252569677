"""Graceful shutdown on SIGINT and SIGTERM, only where a command enables it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_GRACEFUL: ContextVar[bool] = ContextVar("graceful", default=False)


@contextmanager
def graceful_shutdown() -> Iterator[None]:
    """Let long work inside this context handle SIGINT and SIGTERM.

    Training saves a checkpoint and exits, a judge keeps its answers. Outside this context the caller handles signals.
    """
    token = _GRACEFUL.set(True)
    try:
        yield
    finally:
        _GRACEFUL.reset(token)


def handles_signals() -> bool:
    """Return whether long work may install signal handlers."""
    return _GRACEFUL.get()
