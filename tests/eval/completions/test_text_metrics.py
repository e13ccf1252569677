"""Text metrics against values worked out by hand and a loop over tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest

from drpo.data.records import DataError, Record
from drpo.rewards import Completion
from eval.completions.rows import REFERENCE, CompletionRow, prompt_id_of
from eval.completions.text_metrics import (
    distinct_n,
    measure,
    perplexity_interval,
    rouge_f1,
    rouge_l,
    words,
)
from eval.completions.text_metrics_table import cell_text, save_text_metrics, text_metrics_table


def row(response, prompt="p", reference=None, ended=True, num_tokens=None, seed=0, system="sft"):
    return CompletionRow(
        system, prompt_id_of(prompt), prompt, response, ended, num_tokens, seed, reference, {}
    )


# --- texts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response, reference, expected",
    [
        # the, cat, on, mat of 5 and 6 words; "the cat" of 4 and 5 pairs; the cat on mat in order
        ("the cat on a mat", "the cat sat on the mat", (8 / 11, 2 / 9, 8 / 11)),
        # the example of rouge-score's own page: 6, 3 and 5 of 8 and 9 words (7 and 8 pairs)
        (
            "The quick brown dog jumps on the log.",
            "The quick brown fox jumps over the lazy dog",
            (12 / 17, 4 / 15, 10 / 17),
        ),
        ("d c b a", "a b c d", (1.0, 0.0, 0.25)),
        ("a a a a", "a b", (1 / 3, 0.0, 1 / 3)),  # counts are clipped: one a of 4 and 2 words
        ("SOAP, rope!", "soap rope", (1.0, 1.0, 1.0)),
        ("ça été là", "Ça été", (0.8, 2 / 3, 0.8)),
        ("", "soap rope", (0.0, 0.0, 0.0)),
    ],
)
def test_rouge_by_hand(response, reference, expected):
    scores = rouge_f1([response], [reference])
    assert [scores[name][0] for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx(expected)


def test_words_of_ascii_text_are_those_of_rouge_score():
    from rouge_score.tokenizers import DefaultTokenizer

    text = 'I\'m 23 (F); he_said: "NO-ONE" e.g. at 3.5%...\n\tU.S. a1b2'
    assert words(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)
    assert words("你好, naïve Ärger_5") == ["你好", "naïve", "ärger", "5"]


def test_distinct_n_by_hand():
    texts = ["a b A b.", "b a"]
    assert distinct_n(texts, 1) == pytest.approx(2 / 6)
    assert distinct_n(texts, 2) == pytest.approx(2 / 4)  # ab ba ab, ba
    assert distinct_n(texts, 4) == 1.0  # abab
    assert distinct_n(texts, 5) is None
    with pytest.raises(ValueError, match="n must be"):
        distinct_n(texts, 0)


def test_words_are_counted_between_whitespace():
    texts = (" it's  a\ntest-case ", "", " ")
    assert [measure([row(text)]).num_words.value for text in texts] == [3, 0, 0]


# --- one system -----------------------------------------------------------------------------------------


def test_metrics_are_means_over_prompts_and_not_over_rows():
    rows = [
        row("a b", "p", "a b", num_tokens=3, seed=0),
        row("a c d e", "p", "a b", ended=False, num_tokens=5, seed=1),
        row("c", "q", "a b", num_tokens=2),
    ]
    metrics = measure(rows)
    assert (metrics.system, metrics.num_responses, metrics.num_prompts) == ("sft", 3, 2)
    assert metrics.rouge1.value == pytest.approx(((1 + 1 / 3) / 2 + 0) / 2)
    assert metrics.rouge2.value == pytest.approx((1 / 2 + 0) / 2)
    assert metrics.num_tokens.value == pytest.approx((4 + 2) / 2)
    assert metrics.num_words.value == pytest.approx((3 + 1) / 2)
    assert metrics.ended.value == pytest.approx((1 / 2 + 1) / 2)
    assert metrics.num_words.num_prompts == metrics.ended.num_prompts == 2
    assert metrics.distinct1 == pytest.approx(5 / 7)
    assert metrics.perplexity is None


def test_the_interval_is_as_wide_for_a_prompt_asked_once_as_for_one_asked_often():
    once = [row("a " * n, f"p{n}", "a b") for n in range(1, 9)]
    often = [row("a " * n, f"p{n}", "a b", seed=seed) for n in range(1, 9) for seed in range(5)]
    assert measure(once).num_words == measure(often).num_words
    assert measure(once).rouge1 == measure(often).rouge1


def test_what_cannot_be_measured_is_none():
    plain = measure([row("a", "p"), row("b", "q", reference=" ...")])
    assert plain.rouge1 is plain.rouge2 is plain.rougeL is plain.num_tokens is None
    some = measure([row("a b", "p", "a b"), row("c", "q", "..."), row("c", "r", "c d")])
    assert some.rouge1.num_prompts == 2  # the reference without a word is no measure of anything
    assert (
        measure([row("a", "p", "a", system=REFERENCE), row("b", "q", "b", system=REFERENCE)]).rougeL is None
    )
    empty = measure([row("", "p", ended=False), row("", "q", ended=False)])
    assert empty.distinct1 is None and empty.num_words.value == 0
    with pytest.raises(DataError, match=r"one system's responses, got \['dpo', 'sft'\]"):
        measure([row("a"), row("a", system="dpo")])
    with pytest.raises(DataError, match="no rows"):
        measure([])


def test_one_prompt_has_a_mean_and_no_limits(tmp_path):
    metrics = measure([row("a b", "p", "a", num_tokens=3)])
    assert metrics.num_tokens.value == 3 and math.isnan(metrics.num_tokens.low)
    save_text_metrics([metrics], tmp_path / "metrics.json")
    text = (tmp_path / "metrics.json").read_text()
    assert '"low": null' in text and "NaN" not in text
    table = text_metrics_table([metrics])
    assert [column.header for column in table.columns] == ["", "sft"]
    assert cell_text(metrics.num_tokens) == "3"


# --- perplexity -----------------------------------------------------------------------------------------


def test_perplexity_weighs_tokens_and_counts_prompts():
    nlls, counts = np.array([2.0, 4.0, 0.0]), np.array([1, 3, 0])
    interval = perplexity_interval(nlls, counts, ["p", "q", "r"])
    assert interval.value == pytest.approx(math.exp(6 / 4))
    assert interval.num_prompts == 2
    # Residuals 2 - 1.5 and 4 - 3 x 1.5: se = sqrt(2 (0.25 + 0.25)) / 4; t with one degree of freedom is 12.706.
    assert (interval.low, interval.high) == pytest.approx((1.0, math.exp(1.5 + 12.706 / 4)), rel=1e-3)
    assert perplexity_interval(np.zeros(1), np.zeros(1, dtype=int), ["p"]) is None
    assert math.isnan(perplexity_interval(nlls[:1], counts[:1], ["p"]).low)

    generator = np.random.default_rng(0)
    counts = generator.integers(5, 40, size=60)
    nlls = counts * generator.normal(2.0, 0.3, size=60)
    names = [f"p{i}" for i in range(60)]
    single = perplexity_interval(nlls, counts, names)
    double = perplexity_interval(np.tile(nlls, 2), np.tile(counts, 2), names * 2)
    assert (single.low, single.high) == pytest.approx((double.low, double.high))
    # The delta method: the ratio's standard error, times the perplexity.
    ratio = nlls.sum() / counts.sum()
    error = np.sqrt(((nlls - ratio * counts) ** 2).sum()) / counts.sum()
    assert single.low == pytest.approx(math.exp(ratio - 1.96 * error), rel=0.02)
    assert single.high == pytest.approx(math.exp(ratio + 1.96 * error), rel=0.02)


def test_rouge_l_scores_a_response_by_the_one_of_the_data():
    """The cat on mat, in order: 4 of 5 and of 6 words."""
    responses = ["the cat on a mat", "the cat sat on the mat", "a dog"]

    def completion(response, reference):
        return Completion("p", response, True, [], [], Record("p", completion=reference))

    scores = rouge_l([completion(response, "the cat sat on the mat") for response in responses])
    assert scores == pytest.approx([8 / 11, 1, 0])
    with pytest.raises(ValueError, match="1 of 2 prompts have no response in the data"):
        rouge_l([completion("a", "b"), completion("a", None)])
