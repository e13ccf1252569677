"""Draw where rollouts start: at the prompt, or after a prefix of a dataset response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drpo.data.encode import Example
from drpo.data.order import item_at
from drpo.rollout.resets import ResetConfig, draw_reset_length, prefix_boundaries, reset_response

if TYPE_CHECKING:
    from drpo.rollout.generator import Generator, RolloutConfig


@dataclass(frozen=True)
class Start:
    """Start of a rollout: the prompt, and `prefix` tokens of a dataset response of `source_length`."""

    episode: int
    "Determines the random numbers together with the run's seed."
    example: Example
    prefix: tuple[int, ...] = ()
    source_length: int = 0


def draw_starts(
    examples: Sequence[Example],
    episodes: range,
    reset: ResetConfig,
    rollout: RolloutConfig,
    generator: Generator,
    progress: float,
    seed: int,
) -> list[Start]:
    """Draw the starts of the given episodes; each depends on (seed, episode) alone.

    A dataset response is cut at its first stop token, so no prefix extends beyond it.

    Args:
        examples: the prompts, and the responses to reset to.
        episodes: numbers of the rollouts.
        reset: share and lengths of resets.
        rollout: rollouts per prompt, and their longest response.
        generator: its tokenizer and stop ids.
        progress: share of training done, in [0, 1].
        seed: the run's seed.
    """
    starts = []
    for episode in episodes:
        example = item_at(examples, episode // rollout.rollouts_per_prompt, seed)
        prefix: tuple[int, ...] = ()
        source_length = 0
        if reset.proportion > 0:
            source = reset_response(example, reset.source)
            ends = (i + 1 for i, token in enumerate(source) if token in generator.vocabulary.stop_ids)
            source = source[: next(ends, len(source))]
            boundaries = prefix_boundaries(source, reset.boundary, generator.tokenizer)
            length = draw_reset_length(
                reset, boundaries, len(source), rollout.max_response_length, progress, seed, episode
            )
            prefix = tuple(source[:length])
            source_length = len(source) if length else 0
        starts.append(Start(episode, example, prefix, source_length))
    return starts
