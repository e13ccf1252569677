"""Graceful shutdown on SIGINT and SIGTERM: where a command asks for it, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_GRACEFUL: ContextVar[bool] = ContextVar("graceful", default=False)


@contextmanager
def graceful_shutdown() -> Iterator[None]:
    """Let long work inside this context handle SIGINT and SIGTERM: training checkpoints and leaves, a judge keeps what
    was answered. Outside it signals are the caller's, as a library should leave them."""
    before = _GRACEFUL.set(True)
    try:
        yield
    finally:
        _GRACEFUL.reset(before)


def handles_signals() -> bool:
    """Whether long work may install signal handlers."""
    return _GRACEFUL.get()
