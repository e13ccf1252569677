"""What an evaluation reports on one model, as JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from drpo.data.encode import Example
from eval.reward_models.models import LoadedModel
from eval.reward_models.pairs import (
    ScoredPairs,
    checked_scores,
    completion_of,
    groups_of,
    load_split,
    score_gaps,
)
from eval.reward_models.recipe import EvaluateRewardModelRecipe
from eval.statistics.calibration import calibration
from eval.statistics.intervals import mean_interval
from eval.statistics.length_bias import length_bias
from eval.statistics.pair_accuracy import PairAccuracy, accuracy_by, number_groups, pair_accuracy
from eval.statistics.score_summary import distribution


def plain(value: Any) -> Any:
    """Convert dataclasses, tuples and numpy numbers to JSON values; nan becomes None."""
    if is_dataclass(value):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def measure_pairs(
    recipe: EvaluateRewardModelRecipe, examples: Sequence[Example], pairs: ScoredPairs
) -> dict[str, Any]:
    """Compute accuracy, calibration, length bias and distributions of scores.

    Accuracies by the data's own score gap are there where the data has one.
    """
    ids, level = pairs.prompt_ids, recipe.confidence
    gaps = score_gaps(examples)

    def by(groups: Sequence[str]) -> dict[str, PairAccuracy]:
        found = accuracy_by(pairs.margins, groups, ids, level)
        return {name: found[name] for name in sorted(found, key=_place)}

    return plain(
        {
            "accuracy": pair_accuracy(pairs.margins, ids, level),
            "subsets": {
                column: by(groups_of(examples, column, recipe.num_bins)) for column in recipe.subsets
            },
            "score_gaps": None if gaps is None else by(number_groups(gaps, recipe.num_bins)),
            "calibration": calibration(pairs.margins, ids, recipe.num_bins, level),
            "length": length_bias(pairs.margins, pairs.length_differences, gaps, ids, level),
            "scores": {
                "chosen": distribution(pairs.chosen),
                "rejected": distribution(pairs.rejected),
                "margin": distribution(pairs.margins),
            },
        }
    )


def _place(name: str) -> tuple[bool, float, str]:
    """Sort numbers and ranges by their lower end, before texts."""
    try:
        return False, float(name.partition(" to ")[0]), name
    except ValueError:
        return True, 0.0, name


def measure_references(recipe: EvaluateRewardModelRecipe, model: LoadedModel) -> dict[str, Any] | None:
    """Compute mean and deviation of the scores of the data's best responses to the first prompts.

    A normalised model has mean 0 and, with score.unit_variance, deviation 1. None where no response is there, or
    recipe.num_references=0.
    """
    if recipe.num_references == 0:
        return None
    examples, _ = load_split(recipe, model.tokenizer, "prompts")
    references = [e for e in examples if e.completion_ids is not None][: recipe.num_references]
    if not references:
        return None
    stop_id = model.tokenizer.eos_token_id  # a response that was cut at data.max_response_length has none
    completions = [
        completion_of(
            e,
            e.record.without_opening(e.record.completion),
            e.completion_ids,
            e.completion_ids[-1] == stop_id,
        )
        for e in references
    ]
    scores = checked_scores(model.score, completions, model.key)
    mean = mean_interval(scores, confidence=recipe.confidence) if len(scores) > 1 else None
    return plain({"distribution": distribution(scores), "mean": mean})
