"""A bounded buffer of the run's own earlier rollouts, to reset to."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from drpo.config import Section, key, refuse_changed, setting
from drpo.decimals import decimal_floor
from drpo.random_streams import Stream, stream


@dataclass(frozen=True)
class OwnConfig(Section):
    """Settings of `reset.source=own`."""

    size: int = setting(1024, ge=1, le=2**31 - 1)
    """How many of the newest rollouts can be reset to."""
    which: Literal["best", "worst"] = "best"
    """best: those with the highest raw scores. worst: those with the lowest, to try them again from the middle."""
    share: float = setting(0.5, gt=0, le=1)
    """Share of the newest rollouts that are the best (or worst). 1: any of them, whatever its score."""

    def check(self) -> None:
        if self.share == 1:
            rule = (
                f"does nothing with {key('share')}=1, any rollout whatever its score; lower that, or drop it"
            )
            refuse_changed(self, ["which"], rule)


class OwnRollout(NamedTuple):
    """An earlier rollout of the run."""

    prompt: int
    "Index of its prompt in the data."
    response_ids: list[int]
    score: float
    "Raw reward."


class OwnRollouts:
    """The newest rollouts of a run, oldest first."""

    def __init__(self, config: OwnConfig) -> None:
        self.config = config
        self._rollouts: deque[OwnRollout] = deque(maxlen=config.size)
        self._choice: list[OwnRollout] | None = None

    def add(self, rollout: OwnRollout) -> None:
        self._rollouts.append(rollout)
        self._choice = None

    def draw(self, seed: int, episode: int) -> OwnRollout | None:
        """Draw uniformly from the best or worst rollouts, by (seed, episode) and the buffer alone; None if it is empty.

        Of equal scores the newer one comes first.
        """
        if not self._rollouts:
            return None
        if self._choice is None:
            newest_first = reversed(self._rollouts)
            sign = -1 if self.config.which == "best" else 1
            ranked = sorted(newest_first, key=lambda rollout: sign * rollout.score)
            self._choice = ranked[: max(1, decimal_floor(self.config.share * len(ranked)))]
        index = stream(seed, Stream.OWN_ROLLOUTS, episode).integers(len(self._choice))
        return self._choice[index]

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": [list(rollout) for rollout in self._rollouts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rollouts.clear()
        for rollout in state["rollouts"]:
            self.add(OwnRollout(*rollout))
