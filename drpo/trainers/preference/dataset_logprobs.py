"""Log-probabilities of the responses of a whole dataset, computed by all processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from drpo.run.folder import RunFolder
from drpo.tensors import PaddedBatch, pad_batch
from drpo.trainers.preference.pair_objective import block_logprobs
from drpo.trainers.reference import Reference

ROUND = 64  # micro-batches on every process between two updates of the progress bar

Prompt = tuple[Sequence[int], Sequence[Sequence[int]]]
"The ids of a query and of the responses to it."


def reference_logprobs(
    run: RunFolder, prompts: Sequence[Prompt], tokenizer, reference: Reference
) -> list[list[np.ndarray]]:
    """Compute the reference's log-probs of all responses, see `all_logprobs`."""
    score = functools.partial(block_logprobs, share_prompts=run.recipe.share_prompts)
    return all_logprobs(run, prompts, tokenizer.pad_token_id, functools.partial(reference.apply, score))


@torch.no_grad()
def all_logprobs(
    run: RunFolder, prompts: Sequence[Prompt], pad_id: int, score: Callable[[PaddedBatch, int], Tensor]
) -> list[list[np.ndarray]]:
    """Compute the log-probs (length,), float32, of every response of every prompt, on every process.

    `score(batch, k)` scores k blocks with the same queries in each, (k*B, R); prompts with the same number of responses
    are scored together. Raises FloatingPointError on inf or nan.
    """
    engine, microbatch_size = run.engine, run.recipe.batch.microbatch_size
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i][1]), len(prompts[i][0])))
    results: dict[int, list[np.ndarray]] = {}
    per_round = ROUND * microbatch_size * engine.world_size
    run.start_progress("reference log-probs", 0, len(prompts))
    for start in range(0, len(order), per_round):
        local = []
        share = order[start : start + per_round][engine.rank :: engine.world_size]
        for indices in _same_number(share, prompts, microbatch_size):
            num_responses = len(prompts[indices[0]][1])
            queries = [prompts[i][0] for i in indices] * num_responses
            responses = [prompts[i][1][k] for k in range(num_responses) for i in indices]
            with engine.autocast():
                batch = pad_batch(queries, responses, pad_id).to(engine.device)
                table = score(batch, num_responses).float().cpu().numpy()
            for row, i in enumerate(indices):
                rows = zip(table[row :: len(indices)], prompts[i][1], strict=True)  # one of each block
                local.append((i, [logprobs[: len(ids)].copy() for logprobs, ids in rows]))
        results |= dict(engine.gather_objects(local))
        run.advance(min(per_round, len(order) - start))
    for i, logprobs in results.items():
        if not np.isfinite(np.concatenate(logprobs)).all():
            raise FloatingPointError(
                f"the log-probs of prompt {i} are not finite; check the model and its precision"
            )
    return [results[i] for i in range(len(prompts))]


def _same_number(indices: Sequence[int], prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Group prompts into micro-batches of at most `size`, each with equal numbers of responses."""
    groups = [list(group) for _, group in groupby(indices, key=lambda i: len(prompts[i][1]))]
    return [group[first : first + size] for group in groups for first in range(0, len(group), size)]
