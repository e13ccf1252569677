"""Rewards that are read off the text of a response: its length, its format."""

from __future__ import annotations

import re
from collections.abc import Sequence

from drpo.data.records import DataError
from drpo.rewards import Completion


def num_tokens(completions: Sequence[Completion]) -> list[float]:
    """Return the number of response tokens, a sampled stop token included."""
    return [float(len(completion.response_ids)) for completion in completions]


def relative_length(completions: Sequence[Completion]) -> list[float]:
    """Return (l - l_ref) / l_ref, with the lengths of response and reference in characters, white space aside.

    Raises DataError, naming the row, where the data has no reference.
    """
    scores = []
    for completion in completions:
        length = len((completion.record.completion or "").strip())
        if length == 0:
            raise DataError(
                f"{completion.record.origin} has no reference, so a response has no length relative to it; use data "
                "with references, or length=tokens"
            )
        scores.append((len(completion.response.strip()) - length) / length)
    return scores


class FormatReward:
    """RewardFn: 1 where the whole response, surrounding white space aside, matches a regular expression, else 0."""

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern)

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        return [float(self._pattern.fullmatch(c.response.strip()) is not None) for c in completions]
