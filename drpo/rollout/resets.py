"""Dataset resets: how many tokens of a dataset response each rollout starts from.

A reset is a longer context: the first `h` tokens of a response in the dataset are appended to the prompt, and
the policy continues from there (Chang et al. 2024, arXiv 2404.08495, Algorithm 1: sample a state s_h of a
dataset trajectory, reset to it, roll out). `proportion` is the paper's beta (section 6.2): the share of
rollouts that use a reset; 0 is PPO.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from drpo.config import Section, key, refuse, refuse_changed, setting
from drpo.data.encode import Example
from drpo.data.records import DataError

RESET_STREAM = 1  # keeps the random numbers of resets apart from those of sampling and shuffling


@dataclass(frozen=True)
class ResetConfig(Section):
    """Settings of resets: share of rollouts, source responses, and prefix lengths."""

    proportion: float = setting(1.0, ge=0, le=1)
    """The paper's beta: the probability that a rollout starts from a prefix of a dataset response. 0 is PPO."""
    source: Literal["reference", "chosen", "rejected", "best"] = "reference"
    """Whose prefix: reference (the record's completion), chosen, rejected, or best (the best-scored response)."""
    length: Literal["uniform", "curriculum"] = "uniform"
    """uniform: the prefix length is uniform over the allowed ones. curriculum: from late to early prefixes."""
    min_length: int = setting(0, ge=0)
    """Shortest prefix in tokens: 0 as in the paper (the bare prompt is one of the states), 1 as in the release."""
    min_fraction: float = setting(0.0, ge=0, le=1)
    """Shortest prefix as a fraction of the response's length."""
    max_fraction: float = setting(1.0, ge=0, le=1)
    """Longest prefix as a fraction of the response's length; the last token is never forced."""
    curriculum_end: float = setting(0.5, gt=0, le=1)
    """curriculum: share of training after which all allowed lengths are drawn. Until then the shortest one
    falls linearly from the longest to min_length."""
    boundary: Literal["token", "sentence", "turn"] = "token"
    """Where a prefix may end: after any token, a sentence (. ! ? or newline) or a turn (blank line)."""
    masking: Literal["paper", "release"] = "paper"
    """paper: forced tokens are excluded from losses, KL, whitening and statistics. release: from the policy loss only,
    as in the released code."""

    def check(self) -> None:
        rule = f"({self.min_fraction}) must be <= {key('max_fraction')} ({self.max_fraction})"
        refuse(self.min_fraction > self.max_fraction, "min_fraction", rule)
        if self.length == "uniform":
            refuse_changed(self, ["curriculum_end"], f"applies to {key('length')}=curriculum only")


def reset_response(example: Example, source: str) -> list[int]:
    """Return the tokens of the response that `source` names, stop token included.

    Raises DataError when the record has none.
    """
    match source:
        case "reference":
            ids = example.completion_ids
        case "chosen":
            ids = example.chosen_ids
        case "rejected":
            ids = example.rejected_ids
        case "best":
            scores = example.record.scores
            ids = example.ranked_ids[int(np.argmax(scores))] if scores else None
        case _:
            raise ValueError(f"reset.source={source!r} is not one of reference, chosen, rejected, best")
    if not ids:
        raise DataError(
            f"reset.source={source}: the record at {example.record.origin or 'an unknown place'} has no such "
            "response. Choose a source that the data has, or set reset.proportion=0"
        )
    return ids


def check_resets(
    examples: Sequence[Example], config: ResetConfig, max_response_length: int, tokenizer
) -> None:
    """Raise DataError when an example lacks the source, or none has a prefix that the settings allow.

    Without any prefix, every rollout would start from its prompt, as in PPO.
    """
    sources = [reset_response(example, config.source) for example in examples]
    for source in sources:
        boundaries = prefix_boundaries(source, config.boundary, tokenizer)
        if any(h > 0 for h in _allowed(config, boundaries, len(source), max_response_length)):
            return
    raise DataError(
        f"reset: none of {len(sources)} responses has a prefix within reset.min_length={config.min_length}, "
        f"reset.min_fraction={config.min_fraction:g}, reset.max_fraction={config.max_fraction:g}, "
        f"reset.boundary={config.boundary} and rollout.max_response_length={max_response_length}, so nothing would be "
        "reset; widen them, or set reset.proportion=0"
    )


def draw_reset_length(
    config: ResetConfig,
    boundaries: Sequence[int],
    source_length: int,
    max_response_length: int,
    progress: float,
    seed: int,
    episode: int,
) -> int:
    """Draw the number of tokens of a dataset response that this episode starts from.

        z ~ Bernoulli(proportion);   h ~ Uniform{allowed lengths} if z, else h = 0

    Allowed are the boundaries h between max(min_length, ceil(min_fraction L)) and min(floor(max_fraction L), L-1,
    max_response_length-1), L = source_length: the policy samples at least one token. h = 0 when none is allowed.
    The draw depends on (seed, episode) alone: not on the batch, the process, or earlier draws.
    Source: arXiv 2404.08495, Algorithm 1 and section 6.2.

    Args:
        config: share and limits.
        boundaries: increasing token counts (`prefix_boundaries`).
        source_length: tokens of the response.
        max_response_length: longest response of a rollout.
        progress: share of training done, in [0, 1].
        seed: the run's seed.
        episode: number of the rollout.
    """
    generator = np.random.default_rng([seed, RESET_STREAM, episode])
    is_reset = generator.random() < config.proportion
    position = generator.random()
    if not is_reset:
        return 0
    lengths = _allowed(config, boundaries, source_length, max_response_length)
    if not lengths:
        return 0
    if config.length == "curriculum":
        num_skipped = math.floor(len(lengths) * max(0.0, 1.0 - progress / config.curriculum_end))
        lengths = lengths[min(num_skipped, len(lengths) - 1) :]
    return lengths[int(position * len(lengths))]


def _allowed(
    config: ResetConfig, boundaries: Sequence[int], source_length: int, max_response_length: int
) -> list[int]:
    """Return the boundaries within the limits of `draw_reset_length`."""
    low, high = (round(f * source_length, 9) for f in (config.min_fraction, config.max_fraction))
    longest = min(math.floor(high), source_length - 1, max_response_length - 1)
    shortest = max(config.min_length, math.ceil(low))  # rounded: 0.07 * 100 is 7.000000000000001
    return [h for h in boundaries if shortest <= h <= longest]


def prefix_boundaries(response_ids: Sequence[int], boundary: str, tokenizer) -> list[int]:
    """Return increasing token counts at which a prefix of the response may end; 0 is always one.

    A sentence or turn ends where the text so far ends with its mark and the next token does not lengthen it.
    """
    if boundary == "token":
        return list(range(len(response_ids)))
    marks = (".", "!", "?", "\n") if boundary == "sentence" else ("\n\n",)
    texts = [tokenizer.decode(response_ids[:h]) for h in range(1, len(response_ids) + 1)]
    ends = [text.rstrip(" ").endswith(marks) for text in texts]
    return [0] + [h for h in range(1, len(response_ids)) if ends[h - 1] and not ends[h]]
