"""Dataset resets: how many tokens of a dataset response each rollout starts from.

A reset is a longer context: the first `h` tokens of a response in the dataset are appended to the prompt, and
the policy continues from there (Chang et al. 2024, arXiv 2404.08495, Algorithm 1: sample a state s_h of a
dataset trajectory, reset to it, roll out). `proportion` is the paper's beta (section 6.2): the share of
rollouts that use a reset; 0 is PPO. docs/algorithms/resets.md maps the later papers on resets to these settings.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from drpo.config import Section, key, refuse, refuse_changed, setting
from drpo.data.encode import Example
from drpo.data.records import DataError
from drpo.decimals import decimal_ceil, decimal_floor
from drpo.random_streams import Stream, stream
from drpo.rollout.own_rollouts import OwnConfig
from drpo.rollout.prefix_search import AdaptiveConfig

Schedule = Literal["constant", "linear", "cosine"]


def scheduled(schedule: Schedule, progress: float, end: float) -> float:
    """Return the factor of a schedule at `progress`, the share of training done, in [0, 1].

    linear: 1 - u,    cosine: (1 + cos(pi u)) / 2,    u = min(1, progress / end);    constant: 1
    """
    elapsed = min(1.0, progress / end)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - elapsed
        case "cosine":
            return (1.0 + math.cos(math.pi * elapsed)) / 2


@dataclass(frozen=True)
class ResetConfig(Section):
    """Settings of resets: share of rollouts, source responses, and prefix lengths."""

    proportion: float = setting(1.0, ge=0, le=1)
    """The paper's beta: the probability that a rollout starts from a prefix of a response. 0 is PPO."""
    proportion_schedule: Schedule = "constant"
    """linear, cosine: the proportion falls from `proportion` to 0 at `schedule_end`."""
    source: Literal["reference", "chosen", "rejected", "best", "own", "initial"] = "reference"
    """Whose prefix: reference (the record's completion), chosen, rejected or best (the best-scored response) of the
    dataset; own: an earlier rollout of this run, with its prompt; initial: a sample of the initial policy."""
    per: Literal["rollout", "prompt"] = "rollout"
    """prompt: all rollouts of a prompt (rollout.rollouts_per_prompt) start from one state, drawn once. rollout: each
    has its own reset."""
    length: Literal["uniform", "curriculum", "binomial", "adaptive"] = "uniform"
    """uniform: the prefix length is uniform over the allowed ones. curriculum: from late to early prefixes. binomial:
    Binomial(L, p), with p from max_fraction at the start to min_fraction at the end of `length_schedule`; without one
    p is max_fraction, which must be below 1. adaptive: the shortest prefix from which the policy reaches a target,
    found prompt by prompt (`adaptive`)."""
    length_schedule: Schedule = "constant"
    """linear, cosine: the longest length of length=uniform falls to the shortest allowed one, and p of binomial to
    min_fraction, until `schedule_end`; from then on there are no resets."""
    schedule_end: float = setting(1.0, gt=0, le=1)
    """Share of training after which schedules have ended: with one there are no resets from then on."""
    min_length: int = setting(0, ge=0)
    """Shortest prefix in tokens: 0 as in the paper (the bare prompt is one of the states), 1 as in the release."""
    min_fraction: float = setting(0.0, ge=0, lt=1)
    """Shortest prefix as a fraction of the response's length."""
    max_fraction: float = setting(1.0, gt=0, le=1)
    """Longest prefix as a fraction of the response's length; the last token is never forced."""
    curriculum_end: float = setting(0.5, gt=0, le=1)
    """curriculum: share of training after which all allowed lengths are drawn. Until then the shortest one
    falls linearly from the longest to min_length."""
    boundary: Literal["token", "sentence", "turn"] = "token"
    """Where a prefix may end: after any token, a sentence (. ! ? or newline) or a turn (blank line)."""
    masking: Literal["paper", "release"] = "paper"
    """paper: forced tokens are excluded from losses, KL, whitening and statistics. release: from the policy loss only,
    as in the released code, and from the logs, which there have them."""
    sft_coef: float = setting(0.0, ge=0)
    """Weight of an auxiliary loss while the policy is trained: the mean -log pi of the forced tokens, under the
    distribution of the rollouts (rollout.sampling.temperature, rollout.bad_tokens). 0: none."""
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    """Target and speed of length=adaptive."""
    own: OwnConfig = field(default_factory=OwnConfig)
    """Which earlier rollouts source=own resets to."""

    def check(self) -> None:
        rule = f"({self.min_fraction}) must be <= {key('max_fraction')} ({self.max_fraction})"
        refuse(self.min_fraction > self.max_fraction, "min_fraction", rule)
        if self.length != "curriculum":
            refuse_changed(self, ["curriculum_end"], f"applies to {key('length')}=curriculum only; drop it")
        if self.length != "adaptive":
            rule = f"applies to {key('length')}=adaptive only; drop it"
            refuse_changed(self.adaptive, vars(self.adaptive), rule, "adaptive.")
        if self.source != "own":
            refuse_changed(self.own, vars(self.own), f"applies to {key('source')}=own only; drop it", "own.")
        if self.length in ("curriculum", "adaptive"):
            rule = f"does not apply to {key('length')}={self.length}, which moves by itself; drop it"
            refuse_changed(self, ["length_schedule"], rule)
        if self.length == "binomial" and self.length_schedule == "constant":
            rule = f"is where {key('length_schedule')} ends, and there is none; set one, or drop it"
            refuse_changed(self, ["min_fraction"], rule)
            rule = f"must be below 1 without {key('length_schedule')}: every prefix would be the longest"
            refuse(self.max_fraction == 1, "max_fraction", rule)
        if self.source == "own" and self.length == "adaptive" and self.own.which == "worst":
            rule = (
                f"must be score with {key('own.which')}=worst, which resets to bad rollouts: to reach what these have "
                f"is no success; set {key('adaptive.score')} too"
            )
            refuse(self.adaptive.target == "source", "adaptive.target", rule)
        if {self.proportion_schedule, self.length_schedule} == {"constant"}:
            rule = f"does nothing without {key('proportion_schedule')} or {key('length_schedule')}; set one, or drop it"
            refuse_changed(self, ["schedule_end"], rule)

    @property
    def from_data(self) -> bool:
        """Whether the prefixes are those of responses in the dataset."""
        return self.source not in ("own", "initial")

    @property
    def compares_with_source(self) -> bool:
        """Whether rollouts are held against the response that their prefix is from."""
        return self.proportion > 0 and self.length == "adaptive" and self.adaptive.target == "source"

    @property
    def remembers(self) -> bool:
        """Whether draws depend on earlier rollouts."""
        return self.proportion > 0 and (self.source == "own" or self.length == "adaptive")


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
            raise ValueError(f"{source!r} is not one of reference, chosen, rejected, best")
    if not ids:
        raise DataError(
            f"reset.source={source}: the record at {example.record.origin or 'an unknown place'} has no such "
            "response. Choose a source that the data has, own or initial, which need none, or set reset.proportion=0"
        )
    return ids


def dataset_source(example: Example, source: str, stop_ids: Container[int]) -> list[int]:
    """Return the `reset_response` up to its first stop token, beyond which no prefix extends."""
    return up_to_stop(reset_response(example, source), stop_ids)


def up_to_stop(response: Sequence[int], stop_ids: Container[int]) -> list[int]:
    """Return the response up to its first stop token, which is included: nothing is sampled after one."""
    ends = (i + 1 for i, token in enumerate(response) if token in stop_ids)
    return list(response[: next(ends, len(response))])


def check_resets(
    examples: Sequence[Example],
    config: ResetConfig,
    max_response_length: int,
    tokenizer,
    stop_ids: Container[int] = (),
) -> None:
    """Raise DataError when an example lacks the source, or none has a prefix that the settings allow.

    Without any prefix, every rollout would start from its prompt, as in PPO.

    Args:
        examples: the prompts and their responses.
        config: source and lengths of resets.
        max_response_length: of a rollout.
        tokenizer: finds the ends of sentences and turns.
        stop_ids: those of the policy, once it is loaded: responses are cut there.
    """
    if config.proportion == 0 or not config.from_data:
        return  # nothing is reset, or there is no response yet
    sources = [dataset_source(example, config.source, stop_ids) for example in examples]
    if any(max(prefix_lengths(config, s, max_response_length, tokenizer), default=0) for s in sources):
        return
    raise DataError(
        f"reset: none of {len(sources)} responses has a prefix within reset.boundary={config.boundary}, "
        f"{limits_text(config, max_response_length)}, so nothing would be reset; widen them, or set reset.proportion=0"
    )


def is_reset(config: ResetConfig, progress: float, seed: int, draw: int) -> bool:
    """Draw whether a rollout is reset: z ~ Bernoulli(beta), beta = `reset_share`.

    `draw` is the episode, or the first one of the rollouts that share a reset. The result depends on (seed, draw) and
    the share of training done alone.
    """
    return _random(seed, draw).random() < reset_share(config, progress)


def reset_share(config: ResetConfig, progress: float) -> float:
    """Return the probability of a reset at `progress`: proportion times the factor of its schedule.

    0 once `length_schedule` has ended.
    """
    if scheduled(config.length_schedule, progress, config.schedule_end) == 0:
        return 0.0
    return config.proportion * scheduled(config.proportion_schedule, progress, config.schedule_end)


def draw_reset_length(
    config: ResetConfig,
    lengths: Sequence[int],
    source_length: int,
    progress: float,
    seed: int,
    draw: int,
    position: float | None = None,
) -> int:
    """Draw the number of tokens of a response that a reset rollout starts from; 0 when no length is allowed.

        uniform:    h ~ Uniform{lengths}, up to a longest one that `length_schedule` lowers to the shortest
        curriculum: h ~ Uniform{lengths}, from a shortest one that falls from the longest to the shortest
        binomial:   h ~ Binomial(L, p), lowered to the next allowed length, or the shortest of them,
                    p = f max_fraction + (1 - f) min_fraction
        adaptive:   the allowed length at `position`, rounded up or down at random so that the mean is right

    f is the factor of `length_schedule`; where it has ended, h = 0. The draw depends on (seed, draw) and the arguments
    alone: not on the batch, the process, or earlier draws. Sources: uniform, Chang et al. 2024 (arXiv 2404.08495),
    Algorithm 1; binomial, Liu et al. 2025 (UFT, arXiv 2505.16984), section B.

    Args:
        config: how lengths are drawn.
        lengths: the allowed ones (`allowed_lengths`).
        source_length: L, tokens of the response.
        progress: share of training done, in [0, 1].
        seed: the run's seed.
        draw: number of the draw: the episode, or the first one of the rollouts that share a reset.
        position: for adaptive, from 0, the shortest allowed length, to 1, the longest.
    """
    generator = _random(seed, draw)
    generator.random()  # of is_reset
    uniform = generator.random()
    factor = scheduled(config.length_schedule, progress, config.schedule_end)
    if not lengths or factor == 0:
        return 0
    match config.length:
        case "uniform":
            lengths = lengths[: max(1, decimal_ceil(factor * len(lengths)))]
        case "curriculum":
            share_skipped = max(0.0, 1.0 - progress / config.curriculum_end)
            num_skipped = decimal_floor(share_skipped * len(lengths))
            lengths = lengths[min(num_skipped, len(lengths) - 1) :]
        case "binomial":
            share = config.min_fraction + (config.max_fraction - config.min_fraction) * factor
            drawn = int(generator.binomial(source_length, share))
            return max((h for h in lengths if h <= drawn), default=lengths[0])
        case "adaptive":
            return lengths[min(int(position * (len(lengths) - 1) + uniform), len(lengths) - 1)]
    return lengths[int(uniform * len(lengths))]


def draw_spread(seed: int, group: int) -> float:
    """Draw a uniform number in [0, 1) for the rollouts of a prompt, which places a prompt that was not seen before."""
    return stream(seed, Stream.SPREAD, group).random()


def _random(seed: int, draw: int) -> np.random.Generator:
    return stream(seed, Stream.RESETS, draw)


def prefix_lengths(
    config: ResetConfig, response_ids: Sequence[int], max_response_length: int, tokenizer
) -> list[int]:
    """Return the lengths that a prefix of the response may have, shortest first."""
    boundaries = prefix_boundaries(response_ids, config.boundary, tokenizer)
    return allowed_lengths(config, boundaries, len(response_ids), max_response_length)


def allowed_lengths(
    config: ResetConfig, boundaries: Sequence[int], source_length: int, max_response_length: int
) -> list[int]:
    """Return the boundaries (`prefix_boundaries`) at which a prefix may end, shortest first."""
    shortest, longest = length_limits(config, source_length, max_response_length)
    return [h for h in boundaries if shortest <= h <= longest]


def length_limits(config: ResetConfig, source_length: int, max_response_length: int) -> tuple[int, int]:
    """Return the shortest and the longest prefix of a response; where none is allowed the first is above the second.

    max(min_length, ceil(min_fraction L)) and min(floor(max_fraction L), L-1, max_response_length-1), L = source_length:
    the policy samples at least one token. length=binomial takes the fractions as its p.
    """
    fractions = (0.0, 1.0) if config.length == "binomial" else (config.min_fraction, config.max_fraction)
    low, high = (f * source_length for f in fractions)
    longest = min(decimal_floor(high), source_length - 1, max_response_length - 1)
    return max(config.min_length, decimal_ceil(low)), longest


def limits_text(config: ResetConfig, max_response_length: int) -> str:
    """Return the settings that `length_limits` reads, for messages."""
    fractions = f"reset.min_fraction={config.min_fraction:g}, reset.max_fraction={config.max_fraction:g}"
    limits = [f"reset.min_length={config.min_length}", *[fractions] * (config.length != "binomial")]
    return f"{', '.join(limits)} and rollout.max_response_length={max_response_length}"


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
