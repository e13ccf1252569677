"""Continue rollouts from states within them, for Monte-Carlo values in place of a critic's.

    V(s_j) = mean of the scores of K responses that continue (prompt, response[:j])

Source: Kazemnejad et al. 2024 (VinePPO, arXiv 2410.01679), section 4. Its states are the ends of reasoning steps;
those of SPO-chain (Guo et al. 2025, arXiv 2505.23564) and of other segments give the same estimator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from drpo.config import Section, setting
from drpo.engine import Engine
from drpo.random_streams import SeedOffset
from drpo.rewards import Completion, RewardFn
from drpo.rollout.further_scores import score_evenly
from drpo.rollout.generator import Generator
from drpo.rollout.resets import prefix_boundaries
from drpo.rollout.starts import Start
from drpo.rollout.trajectory import Continuations
from drpo.run.metrics import Phases


@dataclass(frozen=True)
class VineConfig(Section):
    """States whose value is measured, and how; for advantage.estimator=vine."""

    num_rollouts: int = setting(9, ge=1, lt=2**16)
    """K, continuations of each state, 9 as in VinePPO; sampling costs that many times the tokens after the states."""
    every: int = setting(16, ge=1)
    """Fewest tokens between two states; the first state is before the first sampled token."""
    boundary: Literal["token", "sentence", "turn"] = "token"
    """Where a state may be: before any token, or after a sentence (. ! ? or newline) or a turn (blank line)."""


@torch.no_grad()
def continue_states(
    starts: Sequence[Start],
    completions: Sequence[Completion],
    generator: Generator,
    engine: Engine,
    reward_fn: RewardFn,
    config: VineConfig,
    phases: Phases,
) -> Continuations:
    """Sample and score K continuations from the states of this process's share of the rollouts.

    They are sampled as the rollouts are, up to the same length of the whole response; each depends on the seed, the
    episode, the state and its number alone. Raises Interrupted, in all processes, when one is to stop while it waits
    for a server.

    Args:
        starts: one per rollout.
        completions: the rollouts.
        generator: samples the continuations.
        engine: gathers the number of states over the processes.
        reward_fn: scores the continued responses.
        config: states and number of continuations.
        phases: collects the seconds of this phase.
    """
    num_rollouts = config.num_rollouts
    states = [
        (row, position)
        for row, (start, completion) in enumerate(zip(starts, completions, strict=True))
        for position in state_positions(
            completion.response_ids, len(start.prefix), config, generator.tokenizer
        )
    ]
    repeated = [state for state in states for _ in range(num_rollouts)]
    heads = [completions[row].response_ids[:position] for row, position in repeated]
    with phases("vine"), generator.ready(engine), engine.autocast(), engine.interruptible():
        new = generator.generate(
            [[*completions[row].query_ids, *head] for (row, _), head in zip(repeated, heads, strict=True)],
            [generator.max_response_length - position for _, position in repeated],
            [
                (
                    generator.seed + SeedOffset.CONTINUATIONS,
                    draw_number(starts[row].episode, position, number),
                )
                for row, position in states
                for number in range(num_rollouts)
            ],
        )
    continued = generator.completions(
        [starts[row] for row, _ in repeated],
        [[*head, *ids] for head, ids in zip(heads, new.tokens, strict=True)],
    )
    with phases("vine"), engine.interruptible():
        scores = score_evenly(continued, continued[-1], engine, reward_fn)
    return _by_row(states, len(starts), continued, scores, engine)


def state_positions(
    response_ids: Sequence[int], prefix_length: int, config: VineConfig, tokenizer
) -> list[int]:
    """Return the response tokens, increasing, before which a state is: the first sampled one, and then each time the
    next boundary at least `every` tokens on.

    A sentence is known to have ended once the token after it is there, as in the paper, whose steps are found in
    finished texts.
    """
    positions = [prefix_length]
    for boundary in prefix_boundaries(response_ids, config.boundary, tokenizer):
        if boundary >= positions[-1] + config.every:
            positions.append(boundary)
    return positions


def draw_number(episode: int, position: int, number: int) -> int:
    """Return the number of a continuation's random numbers, another one for each episode, state and continuation."""
    return (episode << 40) + (position << 16) + number


def _by_row(
    states: Sequence[tuple[int, int]],
    num_rows: int,
    continued: Sequence[Completion],
    scores: torch.Tensor,
    engine: Engine,
) -> Continuations:
    """Arrange the states by rollout, filled up to the most states that a rollout of any process has."""
    rows, positions = torch.tensor(states).T
    counts = torch.bincount(rows, minlength=num_rows)
    columns = torch.arange(len(states)) - (counts.cumsum(0) - counts)[rows]
    most = int(engine.max(int(counts.max())))

    def arranged(numbers: torch.Tensor, fill: float | bool) -> torch.Tensor:
        result = torch.full((num_rows, most, *numbers.shape[1:]), fill, dtype=numbers.dtype)
        result[rows, columns] = numbers
        return result.to(engine.device)

    shape = (len(states), -1)
    return Continuations(
        positions=arranged(positions, -1),
        scores=arranged(scores.reshape(shape), 0.0),
        ended=arranged(torch.tensor([c.ended for c in continued]).reshape(shape), False),
        lengths=arranged(torch.tensor([len(c.response_ids) for c in continued]).reshape(shape), 0),
    )
