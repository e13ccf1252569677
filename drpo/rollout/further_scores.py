"""Score responses beside the rollouts: those that rollouts are reset to, and continuations of states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drpo.engine import Engine
from drpo.reward_functions import score_in_detail
from drpo.rewards import Completion, RewardFn
from drpo.rollout.generator import Generator
from drpo.rollout.starts import Start
from drpo.run.metrics import Phases


@torch.no_grad()
def score_sources(
    starts: Sequence[Start],
    generator: Generator,
    engine: Engine,
    reward_fn: RewardFn,
    spare: Completion,
    phases: Phases,
) -> Tensor:
    """Score the response that each rollout is reset to, (B,) float32; 0 for a rollout that is not reset.

    A response is scored once for all rollouts of this process that are reset to it, cut to the longest rollout.

    Args:
        starts: one per rollout of this process.
        generator: its tokenizer, stop ids and longest response.
        engine: the processes.
        reward_fn: scores the responses.
        spare: a completion for `score_evenly`.
        phases: collects the seconds of this phase.
    """
    distinct = {(id(start.example), start.source): start for start in starts if start.source}
    responses = [start.source[: generator.max_response_length] for start in distinct.values()]
    completions = generator.completions(list(distinct.values()), responses)
    with phases("reward"), engine.interruptible():
        scores = score_evenly(completions, spare, engine, reward_fn)
    by_source = dict(zip(distinct, scores.tolist(), strict=True))
    return torch.tensor(
        [by_source.get((id(start.example), start.source), 0.0) for start in starts], device=engine.device
    )


def score_evenly(
    completions: Sequence[Completion], spare: Completion, engine: Engine, reward_fn: RewardFn
) -> Tensor:
    """Score this process's completions, however many the others have.

    Forwards of weights that are cut over the processes need all of them: `spare` fills up to the most that any has.
    """
    count = int(engine.max(len(completions))) if engine.partitions_weights else len(completions)
    filled = [*completions, *[spare] * (count - len(completions))]
    return score_in_detail(reward_fn, filled).scores[: len(completions)] if filled else torch.zeros(0)
