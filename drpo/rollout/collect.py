"""Collect one batch of rollouts: sample, and score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from drpo.engine import Engine
from drpo.microbatches import same_query_batches
from drpo.models.trunk import has_trunk, trunk_output
from drpo.reward_functions import reading_trunk, score_in_detail
from drpo.rewards import Completion, RewardFn
from drpo.rollout.generator import Generator
from drpo.rollout.starts import Start
from drpo.rollout.trajectory import Rollouts
from drpo.run.metrics import Phases
from drpo.tensors import PaddedBatch, pad_batch


@torch.no_grad()
def collect(
    starts: Sequence[Start],
    generator: Generator,
    engine: Engine,
    reward_fn: RewardFn,
    rollouts_together: int,
    phases: Phases,
) -> tuple[Rollouts, list[Completion]]:
    """Roll out from the given starts, this process's share of a batch, and score the result.

    Prompts and responses are padded to the longest of all processes. A frozen trunk is computed once for all models
    that share it, a SharingRewardFn included. Raises Interrupted, in all processes, when one is to stop
    while it waits for a server.

    Args:
        starts: one per rollout.
        generator: samples the responses.
        engine: gathers lengths over the processes.
        reward_fn: scores the completions.
        rollouts_together: consecutive rollouts of the whole batch whose prompt may be computed once.
        phases: collects the seconds of each phase.
    """
    policy = generator.policy
    with phases("generate"), generator.ready(engine), engine.autocast(), engine.interruptible():
        completions = generator.respond(starts)
    lengths = torch.tensor([[len(c.query_ids), len(c.response_ids)] for c in completions])
    query_length, response_length = (int(engine.max(int(longest))) for longest in lengths.amax(dim=0))
    batch = pad_batch(
        [completion.query_ids for completion in completions],
        [completion.response_ids for completion in completions],
        generator.vocabulary.pad_id,
        query_length,
        response_length,
    ).to(engine.device)
    trunk = None
    if has_trunk(policy):
        with phases("trunk"), engine.whole_weights(policy), engine.autocast():
            trunk = _trunk(policy, batch, completions, generator.batch_size, rollouts_together)
    with phases("reward"), engine.interruptible():
        indices = torch.arange(len(starts), device=engine.device).split(generator.batch_size)
        parts = [batch.select(part) for part in indices]
        trunks = [None] * len(parts) if trunk is None else trunk.split(generator.batch_size)
        scored = score_in_detail(reading_trunk(reward_fn, parts, trunks), completions)
    rollouts = Rollouts(
        **vars(batch),
        reset_lengths=torch.tensor([len(start.prefix) for start in starts], device=engine.device),
        source_lengths=torch.tensor(
            [len(start.source) if start.prefix else 0 for start in starts], device=engine.device
        ),
        ended=torch.tensor([c.ended for c in completions], device=engine.device),
        scores=scored.scores.to(engine.device),
        reward_names=tuple(scored.details),
        reward_details=_columns(scored.details, engine.device),
        rollouts_together=rollouts_together,
        engine_logprobs=_engine_logprobs(starts, completions, response_length, engine.device),
        trunk=trunk,
    )
    return rollouts, completions


def _trunk(
    policy: nn.Module,
    batch: PaddedBatch,
    completions: Sequence[Completion],
    batch_size: int,
    rollouts_together: int,
) -> Tensor:
    """Return the frozen trunk's output (B, Q+R, H), of `batch_size` rows at a time; a prompt is computed once for up to
    `rollouts_together` of them."""
    queries = [completion.query_ids for completion in completions]
    lengths = [(len(c.query_ids), len(c.response_ids)) for c in completions]
    trunk = None
    for rows, num_continuations in same_query_batches(queries, lengths, batch_size, rollouts_together):
        output = trunk_output(policy, batch.select(rows), num_continuations)
        if trunk is None:
            trunk = output.new_empty(len(completions), *output.shape[1:])
        trunk[rows] = output
    return trunk


def _columns(details: Mapping[str, Tensor], device: torch.device) -> Tensor | None:
    return torch.stack(list(details.values()), dim=1).to(device) if details else None


def _engine_logprobs(
    starts: Sequence[Start], completions: Sequence[Completion], length: int, device: torch.device
) -> Tensor | None:
    """Return the rollout engine's log-probs (B, length) at the sampled tokens, 0 elsewhere, if there is an engine."""
    if completions[0].engine_logprobs is None:
        return None
    logprobs = torch.zeros(len(completions), length)
    for row, (start, completion) in enumerate(zip(starts, completions, strict=True)):
        logprobs[row, len(start.prefix) : len(completion.response_ids)] = torch.tensor(
            completion.engine_logprobs
        )
    return logprobs.to(device)
