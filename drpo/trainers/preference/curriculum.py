"""Curry-DPO: pairs from ranked responses, cut into stages from easy to hard (Pattnaik et al. 2024)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from drpo.config import Section, setting
from drpo.data.encode import Example
from drpo.data.records import DataError, RowError, require_different
from drpo.data.views import pair_of


@dataclass(frozen=True)
class CurriculumConfig(Section):
    """Training in stages of growing difficulty (section `curriculum`)."""

    num_stages: int = setting(3, ge=1)
    """Stages, of equally many pairs each; 1 pools all pairs."""
    pairs: Literal["best_vs_rest", "best_vs_worst", "all"] = "best_vs_rest"
    """Pairs of a prompt: its best response with each other one, as in Curry-DPO; the best with the worst alone; or
    every two. Responses of equal score make none."""
    order: Literal["score_gap", "rank_gap", "reference_gap"] = "score_gap"
    """What a large gap, and so an easy pair, is measured in: scores; places in the ranking of the prompt, where
    equal scores share one; or log-probability under the reference, chosen - rejected."""
    reference: Literal["last", "initial"] = "last"
    """The reference of every stage after the first: the policy that the stage before ended with, or the one that the
    run began with."""
    reset_optimizer: bool = True
    """Begin every stage with an empty optimizer state."""


def build_stages(
    examples: Sequence[Example],
    config: CurriculumConfig,
    reference_logprobs: Sequence[Sequence[float]] | None = None,
) -> tuple[list[list[Example]], list[str]]:
    """Return the pairs of each stage, easiest stage and easiest pair first, and lines for the report.

    `examples` are of the view ranked. The pairs of all prompts are sorted by their gap, largest first, pairs
    of equal gap in the order of the data, and cut into `num_stages` parts whose sizes differ by at most 1.
    The record of a pair has the scores (chosen_score, rejected_score), its `gap` and its `stage` (from 0) in
    `extra`. A tie for the best or the worst response goes to the first in the data.

    `reference_logprobs[i][j]` is log pi_ref(response j | prompt i), summed over tokens, for order reference_gap.
    Raises DataError when there are fewer pairs than stages.
    """
    left_out: Counter[str] = Counter()
    graded: list[tuple[float, Example]] = []
    num_prompts = 0
    for i, example in enumerate(examples):
        scores, num_before = example.record.scores, len(graded)
        logprobs = None if reference_logprobs is None else reference_logprobs[i]
        for chosen, rejected in _candidates(scores, config.pairs):
            try:
                pair = _pair(example, chosen, rejected)
            except RowError as error:
                left_out[error.kind] += 1
            else:
                graded.append((_gap(scores, chosen, rejected, config.order, logprobs), pair))
        num_prompts += len(graded) > num_before
    notes = [f"curriculum: {len(graded)} pairs of {num_prompts} prompts"]
    if num_prompts < len(examples):
        notes.append(f"{len(examples) - num_prompts} prompts make no pair")
    notes += [f"{count} pairs left out: {kind}" for kind, count in left_out.items()]
    if len(graded) < config.num_stages:
        raise DataError(
            f"{len(graded)} pairs do not fill curriculum.num_stages={config.num_stages}: give more data or fewer "
            "stages\n" + "\n".join(notes)
        )
    graded.sort(key=lambda item: -item[0])  # stable: equal gaps keep the order of the data
    stages = []
    for stage in range(config.num_stages):
        first, end = (len(graded) * edge // config.num_stages for edge in (stage, stage + 1))
        part = graded[first:end]
        stages.append([_marked(pair, stage, gap) for gap, pair in part])
        notes.append(
            f"stage {stage}: {len(part)} pairs, {config.order} {part[0][0]:.4g} to {part[-1][0]:.4g}"
        )
    return stages, notes


def _candidates(scores: Sequence[float], pairs: str) -> Iterator[tuple[int, int]]:
    """Yield the indices of each pair's responses, the one of higher score (of a tie: the first) first."""
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    match pairs:
        case "all":
            yield from combinations(order, 2)
        case "best_vs_rest":
            yield from ((order[0], other) for other in order[1:])
        case "best_vs_worst":
            worst = min(order[1:], key=lambda place: (scores[place], place))
            yield order[0], worst


def _pair(example: Example, chosen: int, rejected: int) -> Example:
    record = pair_of(example.record, chosen, rejected)
    if record.extra["chosen_score"] == record.extra["rejected_score"]:
        raise RowError("equal scores")
    require_different(record.chosen, record.rejected)
    ids = example.ranked_ids
    return Example(record, example.query_ids, chosen_ids=ids[chosen], rejected_ids=ids[rejected])


def _gap(
    scores: Sequence[float], chosen: int, rejected: int, order: str, logprobs: Sequence[float] | None
) -> float:
    """Return the gap of a pair by `order`; a larger one is easier."""
    match order:
        case "score_gap":
            return scores[chosen] - scores[rejected]
        case "rank_gap":
            levels = sorted(set(scores))
            return float(levels.index(scores[chosen]) - levels.index(scores[rejected]))
        case "reference_gap":
            return float(logprobs[chosen] - logprobs[rejected])


def _marked(pair: Example, stage: int, gap: float) -> Example:
    extra = {**pair.record.extra, "stage": stage, "gap": gap}
    return replace(pair, record=replace(pair.record, extra=extra))
