"""Log-probabilities of the responses of a whole dataset, computed by all processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from drpo.engine import Engine
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
    """Compute the reference's log-probs (length,), float32, of every response of every prompt."""
    recipe = run.recipe
    score = functools.partial(block_logprobs, share_prompts=recipe.share_prompts)
    logprobs = functools.partial(reference.apply, score)
    size, pad_id = recipe.batch.microbatch_size, tokenizer.pad_token_id
    return all_logprobs(prompts, run.engine, run, logprobs, size, pad_id)


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
        logprobs: `logprobs(batch, k)` scores k blocks with the same queries in each, (k*B, R).
        microbatch_size: prompts per forward.
        pad_id: id of padding.
    """
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
                table = logprobs(batch, num_responses).float().cpu().numpy()
            for row, i in enumerate(indices):
                blocks = table[row :: len(indices)]  # the row of this prompt in each block
                responses = [b[: len(ids)].copy() for b, ids in zip(blocks, prompts[i][1], strict=True)]
                local.append((i, responses))
        results |= dict(engine.gather_objects(local))
        run.advance(min(per_round, len(order) - start))
    for i, responses in results.items():
        if not all(np.isfinite(row).all() for row in responses):
            raise FloatingPointError(
                f"the log-probs of prompt {i} are not finite; check the model and its precision"
            )
    return [results[i] for i in range(len(prompts))]


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
