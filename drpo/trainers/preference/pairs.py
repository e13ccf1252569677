"""Pairs for preference training: examples with offsets, token weights and reference log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drpo.data.encode import Example
from drpo.data.records import BadRows, DataError, RowError
from drpo.data.views import PAIR_SCORES
from drpo.preference_losses import score_offsets
from drpo.tensors import PaddedBatch, pad_batch
from drpo.trainers.preference.recipe import LossConfig, OffsetConfig, TokenWeightsConfig
from drpo.trainers.preference.token_labels import token_relevance


@dataclass(frozen=True, slots=True)
class Pair:
    """One chosen and one rejected response to a query; lists and arrays are per token, chosen before rejected."""

    example: Example
    offset: float = 0.0
    "alpha f(score gap), 0 except for ODPO."
    token_weights: tuple[list[float], list[float]] | None = None
    reference_logprobs: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def response_ids(self) -> tuple[list[int], list[int]]:
        return self.example.chosen_ids, self.example.rejected_ids


@dataclass(frozen=True, eq=False)
class PairBatch:
    """B pairs; in all (2B, ...) tensors the chosen responses are on top of the rejected ones."""

    padded: PaddedBatch
    "The 2B responses, each with its query."
    offsets: Tensor
    "(B,)"
    token_weights: Tensor | None
    "(2B, R)"
    reference_logprobs: Tensor | None
    "(2B, R)"
    flipped: Tensor | None
    "(B,) bool: whether noise swapped the pair; None without noise."

    def __len__(self) -> int:
        return len(self.offsets)


def collate_pairs(pairs: Sequence[Pair], pad_id: int, device: torch.device) -> PairBatch:
    """Pad the pairs into one batch on `device`."""
    queries = [pair.example.query_ids for pair in pairs]
    responses = [pair.response_ids[side] for side in (0, 1) for pair in pairs]
    batch = pad_batch(queries + queries, responses, pad_id)

    def padded(name: str) -> Tensor | None:
        """Pad the per-token numbers of a field to (2B, R) with 0; None where the pairs have none."""
        if getattr(pairs[0], name) is None:
            return None
        table = torch.zeros(batch.responses.shape)
        rows = [getattr(pair, name)[side] for side in (0, 1) for pair in pairs]
        for row, numbers in zip(table, rows, strict=True):
            row[: len(numbers)] = torch.tensor(numbers, dtype=torch.float32)
        return table.to(device)

    flipped = None
    if "flipped" in pairs[0].example.record.extra:
        flipped = torch.tensor([pair.example.record.extra["flipped"] for pair in pairs], device=device)
    offsets = torch.tensor([pair.offset for pair in pairs], device=device)
    return PairBatch(
        batch.to(device), offsets, padded("token_weights"), padded("reference_logprobs"), flipped
    )


def make_pairs(
    examples: Sequence[Example], loss: LossConfig, tokenizer, max_bad_fraction: float
) -> tuple[list[Pair], list[str]]:
    """Make pairs with the offsets and weights that the loss needs, and notes on skipped examples.

    Raises DataError when scores or token labels are missing or wrong in more than `max_bad_fraction` of them,
    and for a gap that `loss.offset.on_nonpositive` refuses.
    """
    bad, notes, pairs = BadRows("pairs"), [], []
    num_without_gap = 0
    for example in examples:
        try:
            weights = None if loss.token_weights is None else _weights(example, loss.token_weights, tokenizer)
            offset = 0.0
            if loss.offset is not None:
                offset, has_gap = _offset(example, loss.offset)
                num_without_gap += not has_gap
                if not has_gap and loss.offset.on_nonpositive == "leave_out":
                    continue
            pairs.append(Pair(example, offset, weights))
        except RowError as error:
            bad.add(error.kind, example.record.origin, error.detail)
    bad.check(len(examples), max_bad_fraction)
    if len(bad):
        notes.append(f"{len(bad)} of {len(examples)} pairs left out:\n{bad.summary()}")
    if num_without_gap:
        what = "left out" if loss.offset.on_nonpositive == "leave_out" else "trained without offset"
        notes.append(f"{num_without_gap} of {len(examples)} pairs have no higher score for chosen: {what}")
    if not pairs:
        raise DataError("no pairs are left to train on\n" + "\n".join(notes))
    return pairs, notes


def _offset(example: Example, config: OffsetConfig) -> tuple[float, bool]:
    """Return the offset of a pair, and whether its chosen response has the higher score."""
    extra = example.record.extra
    for key in PAIR_SCORES:
        if key not in extra:
            raise RowError(
                "missing field",
                f"loss.offset needs {key}: give ranked data (responses and scores) or columns "
                f"{' and '.join(PAIR_SCORES)}",
            )
    gap = extra["chosen_score"] - extra["rejected_score"]
    if gap > 0:
        return float(score_offsets(torch.tensor(gap, dtype=torch.float64), config.alpha, config.scale)), True
    if config.on_nonpositive == "refuse":
        raise DataError(
            f"{example.record.origin}: chosen_score - rejected_score is {gap:g}, and ODPO asks for a gap above 0; "
            "loss.offset.on_nonpositive=leave_out leaves such pairs out, no_offset trains them as DPO does"
        )
    return 0.0, False


def _weights(example: Example, config: TokenWeightsConfig, tokenizer) -> tuple[list[float], list[float]]:
    record, weights = example.record, []
    for side, ids in (("chosen", example.chosen_ids), ("rejected", example.rejected_ids)):
        key = f"{side}_relevance"
        if key not in record.extra:
            raise RowError("missing field", f"loss.token_weights needs {key}")
        relevance = token_relevance(tokenizer, getattr(record, side), ids, record.extra[key], config.labels)
        weights.append([1.0 if is_relevant else config.gamma for is_relevant in relevance])
    return tuple(weights)
