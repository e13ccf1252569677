"""A reward function for tests, found by its name."""

from __future__ import annotations


def token_sum(completions) -> list[float]:
    return [float(sum(c.response_ids)) for c in completions]
