"""Metrics of responses that need no judge: ROUGE, length, distinct n-grams, share ended, perplexity.

None of them measures which response is better. They show other changes: longer answers, repetition, truncation, text
that is unlikely under the reference policy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from drpo.data.records import DataError
from drpo.rewards import Completion
from eval.completions.rows import REFERENCE, CompletionRow
from eval.statistics.intervals import (
    Interval,
    checked_confidence,
    mean_interval,
    prompt_codes,
    prompt_means,
    rate_interval,
)

WORD = re.compile(r"[^\W_]+")
ROUGES = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class TextMetrics:
    """The metrics of one system; None where they cannot be measured."""

    system: str
    num_responses: int
    num_prompts: int
    rouge1: Interval | None
    rouge2: Interval | None
    rougeL: Interval | None  # noqa: N815 (its name in the literature)
    num_tokens: Interval | None
    num_words: Interval
    ended: Interval
    distinct1: float | None
    distinct2: float | None
    perplexity: Interval | None


def measure(rows: Sequence[CompletionRow], nlls: tuple[NDArray, NDArray] | None = None) -> TextMetrics:
    """Compute the metrics of one system: means over prompts with 95% intervals that take the prompt as the unit.

    ROUGE is computed against the rows' references, over the prompts that have one with at least one word (counted in
    its `num_prompts`), and not for the references themselves. `nlls` are those of `response_scores.response_nlls` for
    the same rows. Raises DataError for no rows or rows of several systems.
    """
    systems = sorted({row.system for row in rows})
    if len(systems) != 1:
        raise DataError(f"text metrics are those of one system's responses, got {systems or 'no rows'}")
    prompt_ids = [row.prompt_id for row in rows]
    responses = [row.response for row in rows]
    ended = np.array([float(row.ended) for row in rows])
    return TextMetrics(
        system=systems[0],
        num_responses=len(rows),
        num_prompts=len(set(prompt_ids)),
        **{name: _mean(scores, prompt_ids, (0.0, 1.0)) for name, scores in rouge_of_rows(rows).items()},
        num_tokens=_mean([row.num_tokens for row in rows], prompt_ids),
        num_words=_mean([len(text.split()) for text in responses], prompt_ids),
        ended=rate_interval(ended, prompt_codes(prompt_ids, len(rows))),
        distinct1=distinct_n(responses, 1),
        distinct2=distinct_n(responses, 2),
        perplexity=None if nlls is None else perplexity_interval(*nlls, prompt_ids),
    )


def rouge_of_rows(rows: Sequence[CompletionRow]) -> dict[str, NDArray[np.float64]]:
    """Compute `rouge_f1` (n,) against the rows' references.

    It is nan for rows whose reference is missing or has no word, and for the references themselves.
    """
    columns = {name: np.full(len(rows), np.nan) for name in ROUGES}
    usable = [
        i for i, row in enumerate(rows) if row.system != REFERENCE and row.reference and words(row.reference)
    ]
    if usable:
        scores = rouge_f1([rows[i].response for i in usable], [rows[i].reference for i in usable])
        for name, column in columns.items():
            column[usable] = scores[name]
    return columns


def _mean(
    values: Sequence[float | None], prompt_ids: Sequence[str], bounds: tuple[float, float] | None = None
) -> Interval | None:
    """Return the mean of the known values with its interval; no limits for one prompt without `bounds`."""
    numbers = np.asarray(values, dtype=np.float64)
    means = prompt_means(numbers, prompt_codes(prompt_ids, len(numbers)))
    if len(means) == 0:
        return None
    if len(means) == 1 and bounds is None:
        return Interval(float(means[0]), math.nan, math.nan, 1, "one prompt")
    return mean_interval(means, bounds=bounds)


def rouge_l(completions: Sequence[Completion]) -> list[float]:
    """Compute F1 of ROUGE-L to the dataset's response: a rough untrained judge for `judge.kind=function`.

    Raises ValueError when a prompt has no such response.
    """
    references = [completion.record.completion for completion in completions]
    if None in references:
        raise ValueError(
            f"{references.count(None)} of {len(references)} prompts have no response in the data"
        )
    return rouge_f1([completion.response for completion in completions], references)["rougeL"].tolist()


# --- of texts -------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Split into lower-case runs of letters and digits of any script; on ASCII, ROUGE-1.5.5's unstemmed words."""
    return WORD.findall(text.lower())


def rouge_f1(responses: Sequence[str], references: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Compute F1 (n,) of ROUGE-1, ROUGE-2 and ROUGE-L between each response and its reference, in [0, 1].

        F1 = 2 P R / (P + R),   P = overlap / words of the response,   R = overlap / words of the reference

    Overlap: unigrams or bigrams in common (clipped counts), or the longest common subsequence of the whole texts.
    Words are those of `words`, without stemming; a text without words scores 0.
    Source: Lin 2004; the package rouge-score.
    """
    from rouge_score.rouge_scorer import RougeScorer  # slow import

    # Its own tokenizer drops all but ASCII words.
    scorer = RougeScorer(ROUGES, tokenizer=SimpleNamespace(tokenize=words))
    scored = [
        scorer.score(reference, response) for response, reference in zip(responses, references, strict=True)
    ]
    return {name: np.array([scores[name].fmeasure for scores in scored], dtype=np.float64) for name in ROUGES}


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Compute distinct n-grams of `words` divided by all n-grams, over all texts; None when there are none.

    It falls with the amount of text, so compare only systems that answered the same prompts at similar lengths.
    Source: Li et al. 2016, arXiv 1510.03055 (distinct-1, distinct-2).
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    grams = [tuple(text[i : i + n]) for text in map(words, texts) for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


# --- under a policy -------------------------------------------------------------------------------------


def perplexity_interval(
    nlls: NDArray[np.float64],
    num_tokens: NDArray[np.int64],
    prompt_ids: Sequence[str],
    confidence: float = 0.95,
) -> Interval | None:
    """Compute perplexity per token over all responses, exp(all nats / all tokens), with an interval over prompts.

        ppl = exp(R),   R = sum_i nll_i / sum_i n_i,   limits = exp(R +- t_{P-1} se),
        se^2 = P / (P - 1) sum_p (nll_p - R n_p)^2 / (sum_p n_p)^2

    nll_p, n_p are sums over the responses to prompt p, P of them; a longer response has more weight. `nlls`,
    `num_tokens`, `prompt_ids` (n,). Responses without tokens do not count; None when there are no others. A single
    prompt has no interval. Source: Cochran 1977, section 6.3 (ratio estimate), on the log scale.
    """
    confidence = checked_confidence(confidence)
    codes = prompt_codes(np.asarray(prompt_ids), len(nlls))
    sums, counts = np.bincount(codes, weights=nlls), np.bincount(codes, weights=num_tokens)
    sums, counts = sums[counts > 0], counts[counts > 0]
    size = len(counts)
    if size == 0:
        return None
    ratio = float(sums.sum() / counts.sum())
    if size == 1:
        return Interval(math.exp(ratio), math.nan, math.nan, 1, "one prompt")
    error = math.sqrt(size / (size - 1) * float(((sums - ratio * counts) ** 2).sum())) / float(counts.sum())
    half = float(stats.t.isf((1 - confidence) / 2, size - 1)) * error
    low = max(1.0, math.exp(ratio - half))  # a perplexity is at least 1
    return Interval(math.exp(ratio), low, math.exp(ratio + half), size, "ratio")
