"""Rewards from the length and the format of a response, by hand."""

from __future__ import annotations

import pytest

from drpo.data.records import DataError, Record
from drpo.rewards import Completion
from reward_models.text_rewards import FormatReward, num_tokens, relative_length


def response(text: str, reference: str | None = None, num_ids: int = 1) -> Completion:
    record = Record("post", completion=reference, origin="rows.jsonl:7")
    return Completion("post", text, True, [1], list(range(num_ids)), record)


def test_tokens_are_counted_with_the_stop_token():
    assert num_tokens([response("a b", num_ids=4), response("", num_ids=1)]) == [4.0, 1.0]


def test_the_relative_length_is_0_at_the_references_length():
    """Longer by a half, as long, half as long, and nothing; white space at the ends is not counted."""
    reference = " four"
    texts = [" sixsix", " four ", " fo", " "]
    found = relative_length([response(text, reference) for text in texts])
    assert found == pytest.approx([0.5, 0.0, -0.5, -1.0])


@pytest.mark.parametrize("reference", [None, " "])
def test_without_a_reference_the_row_is_named(reference):
    with pytest.raises(DataError, match="rows.jsonl:7 has no reference.*length=tokens"):
        relative_length([response("a", reference)])


def test_the_whole_response_must_match_the_format():
    fits = FormatReward(r"(?s)<think>.*</think>\s*\d+")
    texts = [" <think>a\nb</think> 12 ", "<think></think>3 and more", "3", "see <think></think>3"]
    assert fits([response(text) for text in texts]) == [1.0, 0.0, 0.0, 0.0]
