"""Pairs with their offsets and token weights, what becomes of those that lack them, and batches of pairs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hand_pairs import PAD, PAIRS, STOP, hand_pair
from tiny_tokenizers import byte_level

from drpo.data.encode import Example, encode_response
from drpo.data.records import DataError, Record
from drpo.trainers.preference.pairs import Pair, collate_pairs, make_pairs
from drpo.trainers.preference.recipe import LossConfig, OffsetConfig, TokenWeightsConfig

CPU = torch.device("cpu")
DPO = LossConfig()


def scored(*gaps: float) -> list[Example]:
    return [
        hand_pair(f"p{i}", [3], [4], [5], chosen_score=2.0 + gap, rejected_score=2.0).example
        for i, gap in enumerate(gaps)
    ]


def with_origin(example: Example, origin: str) -> Example:
    return replace(example, record=replace(example.record, origin=origin))


def offsets(examples: list[Example], **settings) -> tuple[list[float], list[str]]:
    pairs, notes = make_pairs(examples, replace(DPO, offset=OffsetConfig(**settings)), None, 0.0)
    return [pair.offset for pair in pairs], notes


# --- offsets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [math.log(0.5), 0.0, math.log(4)]),  # the released one, also below 0
        ({"alpha": 0.5}, [0.5 * math.log(0.5), 0.0, 0.5 * math.log(4)]),
        ({"scale": "identity", "alpha": 2.0}, [1.0, 2.0, 8.0]),
        ({"scale": "log1p"}, [math.log(1.5), math.log(2), math.log(5)]),
        ({"alpha": 0.0}, [0.0, 0.0, 0.0]),
    ],
)
def test_an_offset_is_alpha_f_of_the_score_gap(settings, expected):
    assert offsets(scored(0.5, 1.0, 4.0), **settings) == (pytest.approx(expected), [])


def test_without_an_offset_scores_do_not_matter():
    pairs, notes = make_pairs(scored(1.0, -1.0), DPO, None, 0.0)
    assert [pair.offset for pair in pairs] == [0.0, 0.0] and notes == []
    assert all(pair.token_weights is None and pair.reference_logprobs is None for pair in pairs)


@pytest.mark.parametrize("scale", ["log", "log1p", "identity"])
@pytest.mark.parametrize("alpha", [1.0, 0.0])
def test_pairs_whose_chosen_response_has_no_higher_score(scale, alpha):
    """Gap 0 under log would be -inf, and 0 * -inf not a number: neither may reach a loss."""
    examples = scored(1.0, 0.0, -3.0)
    kept, notes = offsets(examples, scale=scale, alpha=alpha, on_nonpositive="leave_out")
    assert len(kept) == 1 and all(map(math.isfinite, kept))
    assert notes == ["2 of 3 pairs have no higher score for chosen: left out"]
    kept, notes = offsets(examples, scale=scale, alpha=alpha, on_nonpositive="no_offset")
    assert kept[1:] == [0.0, 0.0] and math.isfinite(kept[0])
    assert notes == ["2 of 3 pairs have no higher score for chosen: trained without offset"]


def test_by_default_such_a_pair_stops_the_run_with_its_place_and_what_to_do():
    examples = [with_origin(example, f"own.jsonl:{i}") for i, example in enumerate(scored(1.0, -0.25))]
    with pytest.raises(
        DataError, match="own.jsonl:1: chosen_score - rejected_score is -0.25.*on_nonpositive=leave_out"
    ):
        offsets(examples)


def test_missing_scores_are_bad_rows():
    examples = [with_origin(pair.example, f"own.jsonl:{i}") for i, pair in enumerate(PAIRS[:1])] + scored(
        1, 2, 3
    )
    loss = replace(DPO, offset=OffsetConfig())
    with pytest.raises(
        DataError, match="(?s)1 of 4 pairs are bad.*own.jsonl:0: loss.offset needs chosen_score"
    ):
        make_pairs(examples, loss, None, 0.01)
    pairs, notes = make_pairs(examples, loss, None, 0.5)
    assert len(pairs) == 3
    assert "1 of 4 pairs left out:\n1 x missing field" in notes[0]


def test_nothing_left_is_an_error_that_says_what_was_left_out():
    with pytest.raises(
        DataError, match="(?s)no pairs are left to train on.*2 of 2 pairs have no higher score"
    ):
        offsets(scored(0.0, -1.0), on_nonpositive="leave_out")


# --- token weights ----------------------------------------------------------------------------------------


def labelled(tokenizer, chosen: str, rejected: str, **extra) -> Example:
    record = Record("p", chosen=chosen, rejected=rejected, origin="own.jsonl:7", extra=extra)
    ids = [encode_response(tokenizer, text) for text in (chosen, rejected)]
    return Example(record, [3], chosen_ids=ids[0], rejected_ids=ids[1])


def test_tokens_of_irrelevant_lines_weigh_gamma_on_both_sides():
    tokenizer = byte_level()
    lines = " no change\n", "stable since"
    example = labelled(tokenizer, "".join(lines), lines[1], chosen_relevance=[0, 1], rejected_relevance=[0])
    num_first = len(encode_response(tokenizer, lines[0])) - 1
    num_second = len(encode_response(tokenizer, lines[1])) - 1
    loss = replace(DPO, token_weights=TokenWeightsConfig(gamma=0.25))
    (pair,), notes = make_pairs([example], loss, tokenizer, 0.0)
    assert notes == []
    assert pair.token_weights == (
        [0.25] * num_first + [1.0] * num_second + [1.0],  # the stop token counts
        [0.25] * num_second + [1.0],
    )


def test_labels_of_tokens():
    tokenizer = byte_level()
    ids = encode_response(tokenizer, " the dishes")
    labels = [i % 2 for i in range(len(ids) - 1)]
    example = labelled(
        tokenizer, " the dishes", " the dishes", chosen_relevance=labels, rejected_relevance=labels
    )
    loss = replace(DPO, token_weights=TokenWeightsConfig(gamma=0.0, labels="token"))
    (pair,), _ = make_pairs([example], loss, tokenizer, 0.0)
    assert pair.token_weights == ([*map(float, labels), 1.0],) * 2


def test_missing_or_wrong_labels_are_bad_rows():
    tokenizer = byte_level()
    good = labelled(tokenizer, " a\n b", " c", chosen_relevance=[1, 0], rejected_relevance=[1])
    missing = labelled(tokenizer, " a\n b", " c", chosen_relevance=[1, 0])
    wrong = labelled(tokenizer, " a\n b", " c", chosen_relevance=[1], rejected_relevance=[1])
    loss = replace(DPO, token_weights=TokenWeightsConfig())
    pairs, notes = make_pairs([good, missing, wrong], loss, tokenizer, 0.7)
    assert len(pairs) == 1
    for part in (
        "2 of 3 pairs left out",
        "own.jsonl:7: loss.token_weights needs rejected_relevance",
        "2 lines, 1 labels",
    ):
        assert part in notes[0]
    with pytest.raises(DataError, match="2 of 3 pairs are bad"):
        make_pairs([good, missing, wrong], loss, tokenizer, 0.5)


# --- batches ----------------------------------------------------------------------------------------------


def test_a_batch_holds_the_chosen_responses_on_top_of_the_rejected_ones():
    first, second = PAIRS[3], PAIRS[1]
    arrays = [np.arange(3, dtype=np.float32), np.arange(10, 14, dtype=np.float32)]
    others = [np.array([7.0, 8.0], np.float32), np.arange(20, 26, dtype=np.float32)]
    pairs = [
        replace(first, offset=0.5, token_weights=([1, 0, 1], [0, 1, 1, 1]), reference_logprobs=tuple(arrays)),
        replace(second, offset=-2.0, token_weights=([0, 0.5], [1] * 6), reference_logprobs=tuple(others)),
    ]
    batch = collate_pairs(pairs, PAD, CPU)
    assert len(batch) == 2
    rows = batch.padded
    queries = [[PAD] * 5 + [9, 8, PAD, 6], [7] * 9]
    assert rows.queries.tolist() == queries + queries
    assert rows.query_mask.sum(dim=1).tolist() == [4, 9, 4, 9]
    assert rows.responses.tolist() == [
        [PAD, 27, STOP, PAD, PAD, PAD],
        [15, STOP, PAD, PAD, PAD, PAD],
        [28, PAD, 29, STOP, PAD, PAD],
        [16, 17, 18, 19, 20, STOP],
    ]
    assert rows.response_mask.sum(dim=1).tolist() == [3, 2, 4, 6]
    assert batch.offsets.tolist() == [0.5, -2.0]
    assert batch.token_weights.tolist() == [
        [1, 0, 1, 0, 0, 0],
        [0, 0.5, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1],
    ]
    assert batch.reference_logprobs.tolist() == [
        [0, 1, 2, 0, 0, 0],
        [7, 8, 0, 0, 0, 0],
        [10, 11, 12, 13, 0, 0],
        [20, 21, 22, 23, 24, 25],
    ]
    assert batch.flipped.tolist() == [False, True]


def test_what_pairs_do_not_carry_a_batch_does_not_either():
    record = Record("p", chosen=" a", rejected=" b")
    batch = collate_pairs([Pair(Example(record, [3], chosen_ids=[4, 1], rejected_ids=[5, 1]))], PAD, CPU)
    assert batch.token_weights is batch.reference_logprobs is batch.flipped is None
    assert batch.offsets.tolist() == [0.0]
