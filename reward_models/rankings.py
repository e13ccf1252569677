"""Rankings, the examples of reward-model training: responses to one prompt and which of them is better than which.

A pair is a ranking of two responses. With several pairs of a prompt, or ranked responses, all share one example: they
come in one batch, and their prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drpo.data.encode import Example
from drpo.data.records import BadRows, DataError
from drpo.data.views import PAIR_SCORES
from drpo.tensors import PaddedBatch, pad_batch

Comparison = tuple[int, int, float]
"Places of the better and the worse response, and the gap between their scores in the data (0 without scores)."


@dataclass(frozen=True, slots=True)
class Ranking:
    """A query with distinct responses, and the comparisons between them."""

    query_ids: list[int]
    response_ids: list[list[int]]
    comparisons: list[Comparison]
    ranks: list[int]
    "0 for the best response, equal for equal scores; [] where only comparisons are known."

    @property
    def best(self) -> int:
        """Place of the (first) best response; of comparisons the better one of the first."""
        return self.ranks.index(0) if self.ranks else self.comparisons[0][0]


@dataclass(frozen=True, eq=False)
class RankingBatch:
    """B rankings of up to K responses; row k*B + b of `padded` is response k of ranking b."""

    padded: PaddedBatch
    num_responses: int
    "K. Rankings with fewer have in their place rows of one token, the first of their first response."
    real: Tensor
    "(B, K) bool: which rows are responses."
    comparisons: Tensor
    "(N, 3) int64: ranking, better, worse."
    gaps: Tensor
    "(N,) float32: gaps of scores in the data."
    ranks: Tensor
    "(B, K) int64, -1 without a response or without ranks."
    best: Tensor
    "(B,) int64: place of the best response."

    def __len__(self) -> int:
        return len(self.real)


def pair_rankings(examples: Sequence[Example], by_prompt: bool, needs_gaps: bool) -> list[Ranking]:
    """Make a ranking of every pair, or with `by_prompt` one of all pairs of a prompt, each distinct response once.

    Raises DataError with `needs_gaps` for a pair without scores.
    """
    groups: dict[object, list[Example]] = {}
    for number, example in enumerate(examples):
        groups.setdefault(example.record.marked_prompt if by_prompt else number, []).append(example)
    rankings = []
    for pairs in groups.values():
        places: dict[tuple[int, ...], int] = {}
        comparisons = []
        for pair in pairs:
            better, worse = (
                places.setdefault(tuple(ids), len(places)) for ids in (pair.chosen_ids, pair.rejected_ids)
            )
            comparisons.append((better, worse, _gap(pair) if needs_gaps else 0.0))
        responses = [list(ids) for ids in places]
        rankings.append(Ranking(pairs[0].query_ids, responses, comparisons, []))
    return rankings


def _gap(pair: Example) -> float:
    chosen, rejected = (pair.record.extra.get(name) for name in PAIR_SCORES)
    if chosen is None or rejected is None:
        raise DataError(
            f"{pair.record.origin}: loss.margin_scale needs {' and '.join(PAIR_SCORES)} of every pair: give them, or "
            "ranked data (responses and scores), or set loss.margin_scale=0"
        )
    return chosen - rejected


def ranked_rankings(examples: Sequence[Example]) -> tuple[list[Ranking], list[str]]:
    """Make a ranking of every row of ranked responses with two unequal scores, and notes on rows without.

    Of responses that are equal as tokens the first one stays if their scores are equal too; with unequal ones the row
    is left out, as bad. Raises DataError when no row is left.
    """
    bad, rankings, num_tied = BadRows("ranked rows"), [], 0
    for example in examples:
        scores: dict[tuple[int, ...], float] = {}
        contradicts = False
        for ids, score in zip(example.ranked_ids, example.record.scores, strict=True):
            contradicts |= scores.setdefault(tuple(ids), score) != score
        if contradicts:
            bad.add("equal responses of unequal score", example.record.origin)
            continue
        values = list(scores.values())
        comparisons = [
            (better, worse, values[better] - values[worse])
            for better in range(len(values))
            for worse in range(len(values))
            if values[better] > values[worse]
        ]
        if not comparisons:
            num_tied += 1
            continue
        order = sorted(set(values), reverse=True)
        ranks = [order.index(value) for value in values]
        responses = [list(ids) for ids in scores]
        rankings.append(Ranking(example.query_ids, responses, comparisons, ranks))
    notes = [f"{len(bad)} of {len(examples)} ranked rows left out:\n{bad.summary()}"] if len(bad) else []
    notes += [f"{num_tied} ranked rows have no two unequal scores: left out"] if num_tied else []
    if examples and not rankings:
        raise DataError("\n".join(["no ranked rows are left to train on", *notes]))
    return rankings, notes


def collate_rankings(rankings: Sequence[Ranking], pad_id: int, device: torch.device) -> RankingBatch:
    """Pad rankings into one batch on `device`."""
    num_responses = max(len(ranking.response_ids) for ranking in rankings)
    queries = [ranking.query_ids for ranking in rankings] * num_responses
    columns = [
        ranking.response_ids[k]
        if k < len(ranking.response_ids)
        else ranking.response_ids[0][:1]  # no pad: none may be embedded
        for k in range(num_responses)
        for ranking in rankings
    ]
    counts = torch.tensor([len(ranking.response_ids) for ranking in rankings])
    ranks = torch.full((len(rankings), num_responses), -1)
    for row, ranking in enumerate(rankings):
        ranks[row, : len(ranking.ranks)] = torch.tensor(ranking.ranks, dtype=torch.int64)
    triples = [(row, *pair[:2]) for row, ranking in enumerate(rankings) for pair in ranking.comparisons]
    gaps = [pair[2] for ranking in rankings for pair in ranking.comparisons]
    return RankingBatch(
        pad_batch(queries, columns, pad_id).to(device),
        num_responses,
        (torch.arange(num_responses) < counts[:, None]).to(device),
        torch.tensor(triples).to(device),
        torch.tensor(gaps, dtype=torch.float32).to(device),
        ranks.to(device),
        torch.tensor([ranking.best for ranking in rankings]).to(device),
    )
