"""The pairs of an evaluation: their data, their scores, and scores alone against scores in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from drpo.config import ConfigError, replaced
from drpo.data.encode import Example
from drpo.data.load import DataConfig, load_examples
from drpo.data.noise import NoiseConfig
from drpo.data.records import Record
from drpo.data.views import PAIR_SCORES, View
from drpo.models.positions import check_examples
from drpo.reward_functions import call_reward_fn
from drpo.rewards import Completion, RewardFn
from eval.completions.rows import prompt_id_of
from eval.completions.sample import sha256_of
from eval.progress import Say
from eval.reward_models.models import LoadedModel
from eval.reward_models.recipe import EvaluateRewardModelRecipe
from eval.statistics.pair_accuracy import number_groups

MAX_GROUPS = 50
NO_VALUE = "(none)"


def load_split(
    recipe: EvaluateRewardModelRecipe, tokenizer: PreTrainedTokenizerBase, view: View
) -> tuple[list[Example], str]:
    """Return the examples of the recipe's split, and the report on the data."""
    data: DataConfig = recipe.data
    if view != "pairs":
        data = replaced(data, noise=NoiseConfig())  # noise is for pairs
    splits = load_examples(data, tokenizer, view, held_out_only=recipe.split == "eval")
    examples = splits.train if recipe.split == "train" else splits.eval
    if not examples:
        raise ConfigError(
            f"split={recipe.split} has no {view}; see data.eval_split and data.eval_fraction, or take the other split"
        )
    return examples, splits.report


def texts_sha256(examples: Sequence[Example]) -> str:
    """Hash prompts and both responses, in order: equal for equal pairs, whatever the tokenizer."""
    rows = [
        [e.record.shared_prompt, _response(e.record, "chosen"), _response(e.record, "rejected")]
        for e in examples
    ]
    return sha256_of({"pairs": rows})


def choose_pairs(examples: Sequence[Example], num_pairs: int | None) -> list[Example]:
    """Return so many of the pairs (None: all) in their order, chosen by their texts' hashes: never by their order."""
    if num_pairs is None:
        return list(examples)
    by_hash = sorted(range(len(examples)), key=lambda index: texts_sha256([examples[index]]))
    return [examples[index] for index in sorted(by_hash[:num_pairs])]


def _response(record: Record, name: str) -> str:
    return record.without_opening(getattr(record, name))


@dataclass(frozen=True)
class ScoredPairs:
    """Scores (n,) of the chosen and the rejected responses, and their lengths (n,) in the model's tokens."""

    prompt_ids: tuple[str, ...]
    chosen: NDArray[np.float64]
    rejected: NDArray[np.float64]
    chosen_tokens: NDArray[np.int64]
    rejected_tokens: NDArray[np.int64]

    @property
    def margins(self) -> NDArray[np.float64]:
        """Score of the chosen minus that of the rejected response (n,)."""
        return self.chosen - self.rejected

    @property
    def length_differences(self) -> NDArray[np.int64]:
        """Tokens of the chosen minus those of the rejected response (n,)."""
        return self.chosen_tokens - self.rejected_tokens


def completion_of(example: Example, response: str, response_ids: list[int], ended: bool = True) -> Completion:
    """Make the completion that a reward function scores, from the tokens of an example and of a response."""
    record = example.record
    return Completion(record.prompt, response, ended, list(example.query_ids), list(response_ids), record)


def pair_completions(examples: Sequence[Example]) -> list[Completion]:
    """Make the completions of the pairs: chosen and rejected in turn."""
    return [
        completion_of(example, _response(example.record, name), ids)
        for example in examples
        for name, ids in (("chosen", example.chosen_ids), ("rejected", example.rejected_ids))
    ]


def checked_scores(score: RewardFn, completions: Sequence[Completion], key: str) -> NDArray[np.float64]:
    """Score completions (n,). Raises ConfigError, naming the model's `key`, for a score that is not finite."""
    scores = call_reward_fn(score, completions).double().numpy()
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        origin = completions[bad[0]].record.origin
        raise ConfigError(
            f"{key}: {len(bad)} of {len(scores)} scores are not finite, the first at {origin}; check the model and "
            "its precision (dtype, mixed_precision)"
        )
    return scores


def score_pairs(model: LoadedModel, examples: Sequence[Example], say: Say) -> ScoredPairs:
    """Score both responses of each pair. Raises ConfigError for texts that the model has no positions for."""
    for module in model.modules:
        for note in check_examples(module, examples, model.key):
            say(note)
    scores = _scores_of_each(model, pair_completions(examples))
    return ScoredPairs(
        tuple(prompt_id_of(example.record.shared_prompt) for example in examples),
        scores[0::2],
        scores[1::2],
        np.array([len(example.chosen_ids) for example in examples]),
        np.array([len(example.rejected_ids) for example in examples]),
    )


def _scores_of_each(model: LoadedModel, completions: Sequence[Completion]) -> NDArray[np.float64]:
    """Score completions (n,), each distinct one once: a ranked response is in many pairs."""
    places: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    distinct, index = [], []
    for completion in completions:
        tokens = tuple(completion.query_ids), tuple(completion.response_ids)
        if tokens not in places:
            places[tokens] = len(distinct)
            distinct.append(completion)
        index.append(places[tokens])
    return checked_scores(model.score, distinct, model.key)[index]


def invariance(
    model: LoadedModel, examples: Sequence[Example], pairs: ScoredPairs, number: int
) -> dict[str, Any] | None:
    """Score the first `number` pairs again, each response alone, and compare; None for no pairs.

    A batch pads, and computes a shared prompt once: that changes scores by rounding only, unless the model reads its
    padding. `changed_outcomes` counts pairs whose sign is another one.
    """
    number = min(number, len(examples))
    if number == 0:
        return None
    completions = pair_completions(examples[:number])
    alone = np.array([checked_scores(model.score, [each], model.key)[0] for each in completions])
    batched = np.stack([pairs.chosen, pairs.rejected], axis=1)[:number].ravel()
    margins = alone[0::2] - alone[1::2]
    return {
        "num_pairs": number,
        "max_difference": float(np.abs(alone - batched).max()),
        "max_score": float(np.abs(alone).max()),
        "changed_outcomes": int((np.sign(margins) != np.sign(pairs.margins[:number])).sum()),
    }


# --- groups of pairs --------------------------------------------------------------------------------------


def score_gaps(examples: Sequence[Example]) -> NDArray[np.float64] | None:
    """Return the data's own score of the chosen minus that of the rejected response (n,); None if one lacks them."""
    values = [[example.record.extra.get(name) for name in PAIR_SCORES] for example in examples]
    if any(None in pair for pair in values):
        return None
    scores = np.array(values, dtype=np.float64)
    return scores[:, 0] - scores[:, 1]


def groups_of(examples: Sequence[Example], column: str, num_bins: int) -> list[str]:
    """Return the group (n,) of each pair by a column of its data: the value, or the bin of a number.

    Raises ConfigError for a column that no row has, and for one with more than MAX_GROUPS texts.
    """
    values = [_value(example.record.extra, column) for example in examples]
    known = [index for index, value in enumerate(values) if value is not None]
    if not known:
        columns = sorted({name for example in examples for name in example.record.extra})
        raise ConfigError(
            f"subsets: no pair has a column {column!r}; the data's other columns are: {', '.join(columns) or 'none'}"
        )
    groups = [NO_VALUE] * len(values)
    present = [values[index] for index in known]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        names = number_groups(present, num_bins)
    else:
        names = [str(value) for value in present]
    for index, name in zip(known, names, strict=True):
        groups[index] = name
    if len(set(groups)) > MAX_GROUPS:
        raise ConfigError(
            f"subsets: the column {column!r} has {len(set(groups))} different values, more than {MAX_GROUPS}: it "
            "names no groups; choose another column"
        )
    return groups


def _value(extra: Mapping[str, Any], column: str) -> Any:
    """Look up a column, or a field of one by a dotted name; None where there is none."""
    if column in extra:
        return extra[column]
    first, _, rest = column.partition(".")
    inner = extra.get(first)
    return _value(inner, rest) if rest and isinstance(inner, Mapping) else None
