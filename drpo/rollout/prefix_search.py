"""Search for the shortest prefix from which the policy reaches a target, prompt by prompt, while it learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from drpo.config import Section, key, refuse_changed, setting

TOLERANCE = 1 / 32
"Width of an interval that is searched no further."
REACH = 1 / 4
"How far the search then looks again: a prompt's answer moves as the policy learns."


@dataclass(frozen=True)
class AdaptiveConfig(Section):
    """Settings of `reset.length=adaptive`."""

    target: Literal["source", "score"] = "source"
    """The raw score with which a rollout succeeds. source: that of the response that its prefix is from, less `margin`;
    each step scores the responses that it resets to. score: `score`."""
    score: float = 0.0
    """The raw score to reach, for target=score."""
    margin: float = setting(0.1, ge=0)
    """For target=source, in units of the raw score. 0 is too strict for a reward model, which scores one text in two
    batches alike up to rounding only; half of the way from the policy's scores to the responses' is lenient."""
    success: float = setting(0.5, gt=0, lt=1)
    """Share of the rollouts from a prefix that have to succeed for the prefix to be long enough. A rollout that did not
    end succeeds with reward.shaping.missing_stop=none only."""
    start: float = setting(1.0, ge=0, le=1)
    """Where the search begins: 1 is the longest allowed prefix, 0 the shortest."""
    spread: float = setting(0.25, ge=0, le=1)
    """How far from the position of the run prompts that were not seen before are tried, to either side: 0.25 is a
    quarter of the allowed lengths. Without it all of them succeed or fail together, and the policy learns nothing."""
    rate: float = setting(0.5, gt=0)
    """How fast prompts that were not seen before follow the policy: after a step their position, from 0 at the
    shortest allowed prefix to 1 at the longest, falls by rate * (share of successes - success)."""

    def check(self) -> None:
        other = "score" if self.target == "source" else "margin"
        refuse_changed(
            self, [other], f"does not apply to {key('target')}={self.target}; drop it, or change that"
        )


class Trial(NamedTuple):
    """Rollouts of one prompt from prefixes of one length."""

    prompt: int
    "Index of the prompt in the data."
    position: float
    "Length of the prefix: 0 for the shortest allowed, 1 for the longest."
    is_first: bool
    "The prompt had not been tried before."


class PrefixSearch:
    """Bisection to the shortest sufficient prefix of every prompt, begun where the run stands.

    A prompt has an interval of positions; its next rollouts start in the middle c, and then

        success share >= target:  [low, c]        else:  [c, high]

    An interval as narrow as TOLERANCE, or that has left c aside since (a prompt may be tried twice in a step), opens
    again: to c - REACH after a success and to c + REACH after a failure. The
    interval of a new prompt has its middle near a position p that all prompts share, uniformly within `spread` of it. p
    follows the new prompts of every step by stochastic approximation (Robbins and Monro 1951):

        p <- min(1, max(0, p - rate * (mean success share - target)))

    Sources: the shortest expert prefix that succeeds, by bisection, Zhang et al. 2025 (BREAD, arXiv 2506.17211); a
    length by success rate, Li et al. 2025 (SEELE, arXiv 2509.06923).
    """

    def __init__(self, config: AdaptiveConfig) -> None:
        self.config = config
        self.position = config.start
        self._intervals: dict[int, tuple[float, float]] = {}

    def trial(self, prompt: int, uniform: float) -> Trial:
        """Return where rollouts of this prompt should start; `uniform`, in [0, 1), spreads new prompts."""
        if prompt in self._intervals:
            low, high = self._intervals[prompt]
            return Trial(prompt, (low + high) / 2, False)
        position = self.position + self.config.spread * (2 * uniform - 1)
        return Trial(prompt, min(1.0, max(0.0, position)), True)

    def observe(self, trials: Sequence[tuple[Trial, float]]) -> None:
        """Learn from the trials of a step and the shares of their rollouts that succeeded."""
        target = self.config.success
        first = [share for trial, share in trials if trial.is_first]
        for trial, share in trials:
            middle = trial.position
            around = max(0.0, 2 * middle - 1), min(1.0, 2 * middle)
            low, high = self._intervals.get(trial.prompt, around)
            succeeded = share >= target
            if high - low <= TOLERANCE or not low <= middle <= high:
                low, high = max(0.0, middle - REACH), min(1.0, middle + REACH)
            self._intervals[trial.prompt] = (low, middle) if succeeded else (middle, high)
        if first:
            excess = sum(first) / len(first) - target
            self.position = min(1.0, max(0.0, self.position - self.config.rate * excess))

    def state_dict(self) -> dict[str, Any]:
        intervals = {str(prompt): list(interval) for prompt, interval in self._intervals.items()}
        return {"position": self.position, "intervals": intervals}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]
        self._intervals = {int(prompt): tuple(interval) for prompt, interval in state["intervals"].items()}
