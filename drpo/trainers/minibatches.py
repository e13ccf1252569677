"""Minibatches of an epoch, cut into micro-batches of rows of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from drpo.microbatches import Lengths, microbatches
from drpo.rollout.trajectory import Microbatch

MINIBATCH_STREAM = 3  # separates the order of minibatches from other random numbers


def minibatches(
    lengths: Sequence[Lengths],
    num_parts: int,
    max_rows: int | None,
    max_tokens: int | None,
    world_size: int,
    draw: tuple[int, int, int],
    device: torch.device,
) -> Iterator[list[Microbatch]]:
    """Yield the micro-batches of each minibatch of an epoch; number i is for process i % world_size.

    Args:
        lengths: tokens of query and response of every row of the batch.
        num_parts: minibatches of the epoch.
        max_rows: rows of a micro-batch.
        max_tokens: tokens of a micro-batch, padding included.
        world_size: processes.
        draw: seed, step and epoch, on which alone the order depends.
        device: of the row indices.
    """
    seed, step, epoch = draw
    order = np.random.default_rng([seed, MINIBATCH_STREAM, step, epoch]).permutation(len(lengths))
    for indices in np.array_split(order, num_parts):
        groups = microbatches([lengths[row] for row in indices], max_rows, max_tokens, world_size)
        yield [_microbatch(lengths, indices[group], device) for group in groups]


def _microbatch(lengths: Sequence[Lengths], rows: np.ndarray, device: torch.device) -> Microbatch:
    query_length, response_length = np.max([lengths[row] for row in rows], axis=0).tolist()
    return Microbatch(torch.from_numpy(rows).to(device), query_length, response_length)
