"""Best-of-k accuracy on a file of prompts with several chosen and rejected responses: RewardBench 2's format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from drpo.data.encode import encode_query, encode_response
from drpo.data.files import Row, Table, convert_rows, read_table
from drpo.data.in_template import encode_in_template
from drpo.data.load import DataConfig
from drpo.data.records import BadRows, Chat, DataError, Record, RowError, require_text
from drpo.data.stop import template_of
from drpo.models.positions import check_lengths
from drpo.rewards import Completion
from eval.completions.rows import prompt_id_of
from eval.reward_models.measure import plain
from eval.reward_models.models import LoadedModel
from eval.reward_models.pairs import checked_scores
from eval.reward_models.recipe import EvaluateRewardModelRecipe
from eval.statistics.best_of_n import top_credit
from eval.statistics.intervals import mean_interval
from eval.statistics.ties import Margins, margins_of, ties_score

NO_SUBSET = "all"
TIES = "Ties"
"The subset of RewardBench 2 with several right answers: it has a measure of its own, and no best of k."
TIES_ID = re.compile(r"(ref|tied):\d+")


@dataclass(frozen=True)
class ChoiceRow:
    """A prompt with its right and its wrong responses."""

    prompt: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    subset: str
    origin: str
    id: str = ""
    "Of RewardBench 2's Ties ref:<n> for the prompt with one right response, tied:<n> for that with several."


def read_choices(path: str) -> tuple[list[ChoiceRow], str]:
    """Read a file, or the split test of a hub dataset; return its rows and its name.

    Raises DataError unless every row has a text `prompt` and lists of texts `chosen` and `rejected`; `subset` is
    optional, and so is the `id` of Ties, which all or none of these rows have, each its own.
    """
    bad = BadRows()
    table = _table(path, bad)
    absent = {"prompt", "chosen", "rejected"}.difference(table.columns)
    if absent:
        raise DataError(
            f"best_of_k: {table.name} has no column {' or '.join(sorted(absent))}; its columns are: "
            f"{', '.join(table.columns)}"
        )
    rows = convert_rows(table, bad, _choice_row)
    if len(bad):
        raise DataError(f"best_of_k: {len(bad)} of {table.num_rows} rows are bad:\n{bad.summary()}")
    _check_ids([row for row in rows if row.subset == TIES])
    return rows, table.name


def _check_ids(rows: list[ChoiceRow]) -> None:
    """Raise DataError for rows of Ties of which some have no id of RewardBench 2, or have another's."""
    first: dict[str, str] = {}
    for row in rows:
        if row.id in first:
            raise DataError(f"best_of_k: {first[row.id]} and {row.origin} have the same id, {row.id!r}")
        if TIES_ID.fullmatch(row.id):
            first[row.id] = row.origin
    if 0 < len(first) < len(rows):
        without = next(row for row in rows if row.id not in first)
        raise DataError(
            f"best_of_k: {without.origin} has the id {without.id!r} and others of Ties have ref:<n> or tied:<n>; give "
            "all of these rows such ids, or none"
        )


def _table(path: str, bad: BadRows) -> Table:
    return read_table(path, "train" if Path(path).expanduser().is_file() else "test", bad)


def _choice_row(row: Row) -> ChoiceRow:
    values = row.values
    lists = []
    for name in ("chosen", "rejected"):
        texts = values.get(name)
        if not isinstance(texts, list) or not texts:
            raise RowError("wrong type", f"{name} is not a list of at least one text")
        lists.append(tuple(require_text(text, name) for text in texts))
    subset = values.get("subset")
    name = NO_SUBSET if subset is None else str(subset)
    prompt, id = require_text(values.get("prompt"), "prompt"), str(values.get("id", ""))
    return ChoiceRow(prompt, *lists, name, row.origin, id)


def best_of_k(recipe: EvaluateRewardModelRecipe, model: LoadedModel, rows: list[ChoiceRow]) -> dict[str, Any]:
    """Score every response of every row, and compute the credit of the top one, by subset.

        credit = right responses among those of the highest score / number of those

    The mean over subsets counts each once, without Ties. For Ties: the share of prompts on which every right response
    scores above every wrong one (`all_right_first`), on which that gap also exceeds the spread among the right ones
    (`gap_exceeds_spread`), and where the rows have RewardBench 2's ids its score (`eval.statistics.ties`).
    """
    completions = [c for row in rows for c in choice_completions(row, model.tokenizer, recipe.data)]
    lengths = [len(completion.query_ids) + len(completion.response_ids) for completion in completions]
    for module in model.modules:
        check_lengths(module, lengths, model.key, "leave the rows out of best_of_k")
    scores = iter(checked_scores(model.score, completions, model.key))
    credits: dict[str, list[tuple[str, float]]] = {}
    ties: list[tuple[str, Margins]] = []
    for row in rows:
        right = np.array([next(scores) for _ in row.chosen])
        wrong = np.array([next(scores) for _ in row.rejected])
        if row.subset == TIES:
            ties.append((row.id, margins_of(right, wrong)))
        else:
            credits.setdefault(row.subset, []).append((prompt_id_of(row.prompt), top_credit(right, wrong)))
    subsets = {name: _mean(found, recipe.confidence) for name, found in sorted(credits.items())}
    values = [subset["accuracy"]["value"] for subset in subsets.values()]
    return plain(
        {
            "num_rows": len(rows),
            "subsets": subsets,
            "mean_of_subsets": float(np.mean(values)) if values else None,
            "ties": None if not ties else _ties(ties),
        }
    )


def _mean(found: list[tuple[str, float]], confidence: float) -> Mapping[str, Any]:
    prompt_ids, credit = zip(*found, strict=True)
    interval = mean_interval(credit, prompt_ids, confidence, (0.0, 1.0))
    num_tied = sum(0 < value < 1 for value in credit)
    return plain({"n": len(credit), "shared_tops": num_tied, "accuracy": interval})


def _ties(ties: list[tuple[str, Margins]]) -> Mapping[str, Any]:
    first = np.mean([each.is_right for _, each in ties])
    exceeds = np.mean([each.gap > (each.spread or 0.0) for _, each in ties])
    kinds: dict[str, dict[str, Margins]] = {"ref": {}, "tied": {}}
    for id, each in ties if TIES_ID.fullmatch(ties[0][0]) else []:
        kind, _, number = id.partition(":")
        kinds[kind][number] = each
    score = ties_score(**kinds) if any(kinds.values()) else None
    return {"n": len(ties), "all_right_first": first, "gap_exceeds_spread": exceeds, "rewardbench_2": score}


def choice_completions(
    row: ChoiceRow, tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> list[Completion]:
    """Encode a row: with the chat template as one user message, else the prompt as it is."""
    template = template_of(data, tokenizer)
    chat = None
    if template is not None:
        messages = ({"role": "user", "content": row.prompt},)
        chat = Chat(messages, row.prompt, arguments=data.chat_template_kwargs)
    record = Record(row.prompt, origin=row.origin, chat=chat)
    completions = []
    for text in (*row.chosen, *row.rejected):
        if template is None:
            ids = encode_query(tokenizer, row.prompt), encode_response(tokenizer, text)
        else:
            ids = encode_in_template(tokenizer, template, row.prompt, text, True, chat.messages)
        completions.append(Completion(row.prompt, text, True, *ids, record))
    return completions
