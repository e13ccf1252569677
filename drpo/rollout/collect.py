"""Collect one batch of rollouts (sample, score, measure) as a Trajectory for the update."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from drpo.engine import Engine
from drpo.models.trunk import has_trunk, trunk_output
from drpo.reward_functions import call_reward_fn
from drpo.rewards import Completion, RewardFn, TrunkRewardFn
from drpo.rollout.generator import Generator
from drpo.rollout.starts import Start
from drpo.rollout.trajectory import Trajectory
from drpo.run.metrics import Phases
from drpo.tensors import PaddedBatch, pad_batch


class Measured(NamedTuple):
    """Outputs of the models for the response tokens of a padded batch, each (B, R)."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None
    ref_logprobs: Tensor


class Measurement(NamedTuple):
    """Measurement of rollouts by training's forward, on micro-batches of its size and padding.

    The first probability ratio of the update is then exactly 1.
    """

    measure: Callable[[PaddedBatch, Tensor | None], Measured]
    "Takes a batch and, if there is a frozen trunk (drpo.models.trunk), its output."
    microbatch_size: int


@torch.no_grad()
def collect(
    starts: Sequence[Start],
    generator: Generator,
    engine: Engine,
    measurement: Measurement,
    reward_fn: RewardFn,
    phases: Phases,
) -> tuple[Trajectory, list[Completion]]:
    """Roll out from the given starts, this process's share of a batch, and measure the result.

    Prompts and responses are padded to the longest of all processes. A frozen trunk is computed once for all models
    that share it, a TrunkRewardFn included.

    Args:
        starts: one per rollout.
        generator: samples the responses.
        engine: gathers lengths over the processes.
        measurement: gives log-probs, values and reference log-probs, (B, R) each.
        reward_fn: scores the completions.
        phases: collects the seconds of each phase.
    """
    policy = generator.policy
    with phases("generate"), engine.autocast():
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
    indices = torch.arange(len(starts), device=engine.device)
    parts = [batch.select(part) for part in indices.split(measurement.microbatch_size)]
    trunks: list[Tensor | None] = [None] * len(parts)
    if has_trunk(policy):
        with phases("trunk"), engine.autocast():
            trunks = [trunk_output(policy, part) for part in parts]
    with phases("reward"):
        if isinstance(reward_fn, TrunkRewardFn) and reward_fn.shares_trunk:
            reward_fn = functools.partial(reward_fn.score_from_trunk, parts=parts, trunks=trunks)
        scores = call_reward_fn(reward_fn, completions)
    with phases("score"):
        measured = [measurement.measure(part, trunk) for part, trunk in zip(parts, trunks, strict=True)]
    logprobs, entropy, values, ref_logprobs = (
        None if column[0] is None else torch.cat(column).float() for column in zip(*measured, strict=True)
    )
    trajectory = Trajectory(
        **vars(batch),
        reset_lengths=torch.tensor([len(start.prefix) for start in starts], device=engine.device),
        source_lengths=torch.tensor([start.source_length for start in starts], device=engine.device),
        ended=torch.tensor([c.ended for c in completions], device=engine.device),
        scores=scores.to(engine.device),
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
        values=values,
        trunk=torch.cat(trunks) if has_trunk(policy) else None,
    )
    return trajectory, completions
