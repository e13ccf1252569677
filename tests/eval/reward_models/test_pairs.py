"""Groups of pairs by columns of the data, and gaps of the data's scores."""

from __future__ import annotations

import pytest

from drpo.config import ConfigError
from drpo.data.encode import Example
from drpo.data.records import Record
from eval.reward_models.models import LoadedModel
from eval.reward_models.pairs import groups_of, score_gaps, score_pairs, texts_sha256


def examples(*extras: dict) -> list[Example]:
    return [
        Example(
            Record("Why?", chosen=" a", rejected=" b", extra=extra), [1], chosen_ids=[2], rejected_ids=[3]
        )
        for extra in extras
    ]


def test_groups_are_values_of_a_column_or_of_its_field():
    rows = examples(
        {"batch": "b1", "extra": {"confidence": 7}}, {"batch": "b2", "extra": {"confidence": None}}
    )
    assert groups_of(rows, "batch", 5) == ["b1", "b2"]
    assert groups_of(rows, "extra.confidence", 5) == ["7", "(none)"]


def test_a_column_may_have_a_dot_in_its_name():
    assert groups_of(examples({"a.b": "x", "a": {"b": "y"}}), "a.b", 5) == ["x"]


def test_many_numbers_are_binned_and_truths_are_not_numbers():
    rows = examples(*({"n": number, "good": number > 2} for number in (1, 2, 3, 4)))
    assert groups_of(rows, "n", 2) == ["1 to 2", "1 to 2", "3 to 4", "3 to 4"]
    assert groups_of(rows, "good", 2) == ["False", "False", "True", "True"]


def test_an_unknown_column_is_refused_with_those_there():
    with pytest.raises(
        ConfigError, match="no pair has a column 'batsh'; the data's other columns are: batch, x"
    ):
        groups_of(examples({"batch": 1}, {"x": 2}), "batsh", 5)


def test_a_column_of_names_is_refused():
    with pytest.raises(ConfigError, match="'id' has 51 different values, more than 50"):
        groups_of(examples(*({"id": f"row {i}"} for i in range(51))), "id", 5)


def test_gaps_are_there_only_if_every_pair_has_them():
    scored, bare = {"chosen_score": 6.0, "rejected_score": 2.5}, {}
    assert score_gaps(examples(scored)).tolist() == [3.5]
    assert score_gaps(examples(scored, bare)) is None


def test_the_hash_is_of_the_texts_alone():
    one, other = examples({}), examples({"batch": 1})
    assert texts_sha256(one) == texts_sha256(other)
    assert texts_sha256(one) != texts_sha256(one * 2)


def test_a_response_in_many_pairs_is_scored_once():
    """Three ranked responses make three pairs; the score is the number of the response's token."""
    asked: list[int] = []

    def score(completions):
        asked.extend(completion.response_ids[0] for completion in completions)
        return [float(completion.response_ids[0]) for completion in completions]

    pairs = [
        Example(Record("Why?", chosen=f" {c}", rejected=f" {r}"), [1], chosen_ids=[c], rejected_ids=[r])
        for c, r in ((9, 7), (9, 5), (7, 5))
    ]
    scored = score_pairs(LoadedModel("m", "models[0].path", score, (), None, {}), pairs, print)
    assert asked == [9, 7, 5]
    assert (scored.chosen.tolist(), scored.rejected.tolist()) == ([9, 9, 7], [7, 5, 5])
