"""Draw where rollouts start: at the prompt, or after a prefix of a response."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drpo.data.encode import Example
from drpo.data.order import item_at
from drpo.rollout.own_rollouts import OwnRollout, OwnRollouts
from drpo.rollout.prefix_search import PrefixSearch, Trial
from drpo.rollout.resets import (
    ResetConfig,
    dataset_source,
    draw_reset_length,
    draw_spread,
    is_reset,
    prefix_lengths,
    up_to_stop,
)

if TYPE_CHECKING:
    from drpo.rollout.generator import Generator, RolloutConfig


@dataclass(frozen=True)
class Start:
    """Start of a rollout: its prompt, and `prefix`, which begins the response `source`."""

    episode: int
    "Determines the random numbers together with the run's seed."
    example: Example
    prefix: tuple[int, ...] = ()
    source: tuple[int, ...] = ()
    "The response that the rollout is reset to, its stop token included; empty for one that is not."


def ends_within(response: Sequence[int], max_length: int, stop_ids: Container[int]) -> bool:
    """Return whether a response, which goes `up_to_stop`, has its stop token among its first `max_length` tokens."""
    return len(response) <= max_length and response[-1] in stop_ids


class Starts:
    """Draws the starts of a run's rollouts, and remembers what resets depend on besides (seed, episode).

    That is the earlier rollouts (source=own) and the search for prefixes (length=adaptive), which `observe` feeds;
    without them, draws depend on (seed, episode) and the progress alone. The same on every process.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        reset: ResetConfig,
        rollout: RolloutConfig,
        generator: Generator,
        seed: int,
        sample_initial: Callable[[Sequence[Start]], list[list[int]]],
    ) -> None:
        """Draw from `examples`.

        Args:
            examples: the prompts, and the responses to reset to.
            reset: share, source and lengths of resets.
            rollout: rollouts per prompt, and their longest response.
            generator: its tokenizer and stop ids.
            seed: the run's seed.
            sample_initial: samples responses of the initial policy, for source=initial.
        """
        self._examples, self._reset, self._rollout = examples, reset, rollout
        self._generator, self._seed, self._sample_initial = generator, seed, sample_initial
        self._indices = {id(example): index for index, example in enumerate(examples)}
        self._own = OwnRollouts(reset.own)
        self._search = PrefixSearch(reset.adaptive)
        self._trials: list[Trial | None] = []
        self._num_initial = 0

    def draw(self, episodes: range, progress: float) -> list[Start]:
        """Draw the starts of the given episodes at the given share of training done."""
        reset, group_size = self._reset, self._rollout.rollouts_per_prompt
        prompts = [item_at(self._examples, e // group_size, self._seed) for e in episodes]
        draws = [e if reset.per == "rollout" else e - e % group_size for e in episodes]
        resets = [is_reset(reset, progress, self._seed, draw) for draw in draws]
        sources = self._sources(prompts, draws, resets)
        self._trials, starts = [], []
        for episode, prompt, draw, source in zip(episodes, prompts, draws, sources, strict=True):
            start, trial = Start(episode, prompt), None
            # 0 alone is the prompt: that of this episode, not that of an own rollout
            if source is not None and any(lengths := self._lengths(source[1])):
                example, response = source
                position = None
                if reset.length == "adaptive":
                    spread = draw_spread(self._seed, episode // group_size)
                    trial = self._search.trial(self._indices[id(example)], spread)
                    position = trial.position
                length = draw_reset_length(
                    reset, lengths, len(response), progress, self._seed, draw, position
                )
                start = Start(episode, example, tuple(response[:length]), tuple(response))
                if len(lengths) == 1 or not self._has_target(response):
                    trial = None  # says nothing of the position
            starts.append(start)
            self._trials.append(trial)
        return starts

    def _has_target(self, response: Sequence[int]) -> bool:
        """Return whether rollouts can be held against the response: a reward has no meaning where one was cut off."""
        if not self._reset.compares_with_source:
            return True
        return ends_within(response, self._rollout.max_response_length, self._generator.vocabulary.stop_ids)

    def _sources(
        self, prompts: Sequence[Example], draws: Sequence[int], resets: Sequence[bool]
    ) -> list[tuple[Example, list[int]] | None]:
        """Return the prompt and the response that each rollout is reset to; None for those from their prompt.

        A response is cut at its first stop token, so no prefix extends beyond it.
        """
        source, stop_ids = self._reset.source, self._generator.vocabulary.stop_ids
        if source == "own":
            drawn = [
                self._own.draw(self._seed, draw) if z else None for draw, z in zip(draws, resets, strict=True)
            ]
            return [
                None if own is None else (self._examples[own.prompt], up_to_stop(own.response_ids, stop_ids))
                for own in drawn
            ]
        if source == "initial":
            bare = {
                draw: Start(draw, prompt) for prompt, draw, z in zip(prompts, draws, resets, strict=True) if z
            }
            sampled = dict(zip(bare, self._sample_initial(list(bare.values())), strict=True))
            self._num_initial = sum(map(len, sampled.values()))
            responses = [
                up_to_stop(sampled[d], stop_ids) if z else None for d, z in zip(draws, resets, strict=True)
            ]
        else:
            responses = [
                dataset_source(p, source, stop_ids) if z else None
                for p, z in zip(prompts, resets, strict=True)
            ]
        return [
            None if response is None else (prompt, response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    def _lengths(self, response: Sequence[int]) -> list[int]:
        longest = self._rollout.max_response_length
        return prefix_lengths(self._reset, response, longest, self._generator.tokenizer)

    def observe(
        self,
        starts: Sequence[Start],
        responses: Sequence[list[int]],
        scores: Sequence[float],
        may_succeed: Sequence[bool],
        source_scores: Sequence[float] | None = None,
    ) -> None:
        """Remember the rollouts of the starts that were drawn last: all of a step, from all processes, in order.

        Args:
            starts: one per rollout.
            responses: token ids, forced prefix and stop token included.
            scores: raw scores.
            may_succeed: False for a rollout whose score is not to be trusted, such as one that was cut off.
            source_scores: raw scores of the whole responses reset to; for reset.adaptive.target=source.
        """
        if self._reset.source == "own":
            for start, response, score in zip(starts, responses, scores, strict=True):
                self._own.add(OwnRollout(self._indices[id(start.example)], response, score))
        if self._reset.length == "adaptive":
            successes: dict[Trial, list[bool]] = {}
            targets = [self._reset.adaptive.score] * len(starts)
            if self._reset.compares_with_source:
                targets = [source - self._reset.adaptive.margin for source in source_scores]
            for trial, score, target, may in zip(self._trials, scores, targets, may_succeed, strict=True):
                if trial is not None:
                    successes.setdefault(trial, []).append(may and score >= target)
            self._search.observe([(trial, sum(s) / len(s)) for trial, s in successes.items()])

    def metrics(self) -> dict[str, float]:
        """Return what the last draw was made from.

        `reset/initial_tokens`: tokens sampled from the initial policy. `reset/position`: where prompts that were not
        seen before start, 0 at the shortest allowed prefix and 1 at the longest.
        """
        metrics = {}
        if self._reset.proportion == 0:
            return metrics
        if self._reset.source == "initial":
            metrics["reset/initial_tokens"] = float(self._num_initial)
        if self._reset.length == "adaptive":
            metrics["reset/position"] = self._search.position
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return what draws depend on besides (seed, episode); empty for settings without such a memory."""
        state = {}
        if not self._reset.remembers:
            return state
        if self._reset.source == "own":
            state["own"] = self._own.state_dict()
        if self._reset.length == "adaptive":
            state["search"] = self._search.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "own" in state:
            self._own.load_state_dict(state["own"])
        if "search" in state:
            self._search.load_state_dict(state["search"])
