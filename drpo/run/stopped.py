"""The errors that end a run on purpose."""

from __future__ import annotations


class RunStopped(RuntimeError):
    """End of a run by a guard of the recipe, or by a judge; the message names what stopped it, and the remedy."""


class Interrupted(RuntimeError):
    """End of a wait because the process is to stop (SIGTERM or SIGINT)."""
