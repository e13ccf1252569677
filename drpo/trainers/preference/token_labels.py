"""Relevance of a response's tokens in token-weighted DPO, from labels of its lines or of its tokens."""

from __future__ import annotations

import os.path
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from drpo.data.encode import decode_response
from drpo.data.records import RowError


def token_relevance(
    tokenizer: PreTrainedTokenizerBase,
    response_text: str,
    response_ids: Sequence[int],
    labels: Sequence[int],
    unit: Literal["line", "token"],
) -> list[bool]:
    """Return whether each of `response_ids` is relevant; the last one, the stop token, always is.

    A line has its line break; a token that spans two lines belongs to the line in which it starts, also if it starts
    inside a character. Raises RowError for labels of another kind or number, and when the ids cannot be aligned with
    the text (a tokenizer that changes texts). Source: Banerjee et al. 2024, sec. 3 (a label for each line).

    Args:
        tokenizer: made the ids.
        response_text: the response.
        response_ids: its tokens, the stop token last.
        labels: 1 (relevant) or 0 for each line, as `splitlines` cuts the text, or for each token but the stop token.
        unit: what a label is for.
    """
    labels = _checked(labels)
    *text_ids, _ = response_ids
    if unit == "token":
        if len(labels) != len(text_ids):
            raise RowError("labels and tokens differ", f"{len(text_ids)} tokens, {len(labels)} labels")
        return [*labels, True]
    lines = response_text.splitlines(keepends=True)
    if len(labels) != len(lines):
        raise RowError("labels and lines differ", f"{len(lines)} lines, {len(labels)} labels")
    if decode_response(tokenizer, text_ids) != response_text:
        raise RowError("labels and tokens differ", f"the tokens do not spell {response_text.strip()[:60]!r}")

    def start(place: int) -> int:
        """Return the character in which a token starts: the length of the text of the tokens before it."""
        text_before = decode_response(tokenizer, text_ids[:place])
        return len(os.path.commonprefix([text_before, response_text]))

    relevance: list[bool] = []
    end = 0
    for line, label in zip(lines[:-1], labels[:-1], strict=True):
        end += len(line)
        first_beyond = bisect_left(range(len(text_ids)), end, lo=len(relevance), key=start)
        relevance += [label] * (first_beyond - len(relevance))
    return [*relevance, *[labels[-1]] * (len(text_ids) - len(relevance)), True]


def _checked(labels: object) -> list[bool]:
    if not isinstance(labels, list | tuple):
        raise RowError("wrong type", f"labels are {type(labels).__name__}, not a list of 0 and 1")
    for label in labels:
        if label not in (0, 1):
            raise RowError("wrong type", f"a label is {label!r}, neither 0 nor 1")
    return [bool(label) for label in labels]
