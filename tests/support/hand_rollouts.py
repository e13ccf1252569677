"""Trajectories written by hand: rows of a few tokens, with large numbers wherever nothing should look."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drpo.rollout.trajectory import Trajectory

JUNK = 1e4  # stands under padding


def rows(values: Sequence[Sequence[float]], width: int, fill: float = JUNK) -> Tensor:
    """(B, width) float32 from ragged rows, padded on the right with `fill`."""
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in values], dtype=torch.float32)


def hand_trajectory(
    *,
    lengths: Sequence[int],
    forced: Sequence[int],
    width: int,
    scores: Sequence[float] | None = None,
    ended: Sequence[bool] | None = None,
    log_ratios: Sequence[Sequence[float]] | None = None,
    values: Sequence[Sequence[float]] | None = None,
    entropy: Sequence[Sequence[float]] | None = None,
    source_lengths: Sequence[int] | None = None,
    source_scores: Sequence[float] | None = None,
) -> Trajectory:
    """Rows of `lengths` tokens of which the first `forced` are given; `log_ratios` are log pi / pi_ref."""
    num_rows = len(lengths)
    zeros = [[0.0] * length for length in lengths]
    mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
    ref_logprobs = torch.full((num_rows, width), -2.0)
    return Trajectory(
        queries=torch.full((num_rows, 2), 5),
        query_mask=torch.ones(num_rows, 2, dtype=torch.bool),
        responses=torch.full((num_rows, width), 7).masked_fill(mask.logical_not(), 2),
        response_mask=mask,
        reset_lengths=torch.tensor(forced),
        source_lengths=torch.tensor(source_lengths or [0] * num_rows),
        source_scores=None if source_scores is None else torch.tensor(source_scores),
        ended=torch.tensor([True] * num_rows if ended is None else ended),
        scores=torch.tensor([0.0] * num_rows if scores is None else scores),
        logprobs=ref_logprobs + rows(log_ratios or zeros, width),
        ref_logprobs=ref_logprobs,
        values=rows(values or zeros, width),
        entropy=rows(entropy or zeros, width),
    )
