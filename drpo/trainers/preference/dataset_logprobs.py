"""Log-probabilities of the responses of a whole dataset, computed by all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from drpo.engine import Engine
from drpo.run.folder import RunFolder
from drpo.tensors import PaddedBatch, pad_batch

ROUND = 64  # micro-batches on every process between two updates of the progress bar

Prompt = tuple[Sequence[int], Sequence[Sequence[int]]]
"The ids of a query and of the responses to it."


@torch.no_grad()
def all_logprobs(
    prompts: Sequence[Prompt],
    engine: Engine,
    run: RunFolder,
    logprobs: Callable[[PaddedBatch, int], Tensor],
    microbatch_size: int,
    pad_id: int,
) -> list[list[np.ndarray]]:
    """Compute the log-probs (length,), float32, of every response of every prompt, on every process.

    Prompts with the same number of responses are scored together. Raises FloatingPointError on inf or nan.

    Args:
        prompts: queries with their responses.
        engine: divides the prompts among the processes.
        run: shows progress.
        logprobs: `logprobs(rows, k)` scores rows that are k blocks with the same queries in each, (k*B, R).
        microbatch_size: prompts per forward.
        pad_id: id of padding.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i][1]), len(prompts[i][0])))
    found: dict[int, list[np.ndarray]] = {}
    per_round = ROUND * microbatch_size * engine.world_size
    run.start_progress("reference log-probs", 0, len(prompts))
    for start in range(0, len(order), per_round):
        mine = order[start : start + per_round][engine.rank :: engine.world_size]
        local = []
        for indices in _same_number(mine, prompts, microbatch_size):
            num_responses = len(prompts[indices[0]][1])
            queries = [prompts[i][0] for i in indices] * num_responses
            responses = [prompts[i][1][k] for k in range(num_responses) for i in indices]
            with engine.autocast():
                rows = pad_batch(queries, responses, pad_id).to(engine.device)
                table = logprobs(rows, num_responses).float().cpu().numpy()
            for row, i in enumerate(indices):
                blocks = [table[k * len(indices) + row] for k in range(num_responses)]
                local.append(
                    (i, [b[: len(ids)].copy() for b, ids in zip(blocks, prompts[i][1], strict=True)])
                )
        found |= dict(engine.gather_objects(local))
        run.advance(min(per_round, len(order) - start))
    for i, rows in found.items():
        if not all(np.isfinite(row).all() for row in rows):
            raise FloatingPointError(
                f"the log-probs of prompt {i} are not finite; check the model and its precision"
            )
    return [found[i] for i in range(len(prompts))]


def _same_number(indices: Sequence[int], prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Group prompts into micro-batches of at most `size`, each with equal numbers of responses."""
    batches: list[list[int]] = []
    for i in indices:
        last = batches[-1] if batches else None
        if last and len(last) < size and len(prompts[last[0]][1]) == len(prompts[i][1]):
            last.append(i)
        else:
            batches.append([i])
    return batches
