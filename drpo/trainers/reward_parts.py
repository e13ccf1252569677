"""Sections of a reward that has several sources: an ensemble of reward models, and the parts of a weighted sum."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from drpo.config import Section, key, refuse, refuse_changed, setting

Combination = Literal["mean", "min", "mean_minus_std", "mean_minus_variance"]

PART_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class CombineConfig(Section):
    """How the scores of several reward models become one."""

    combine: Combination = "mean"
    """mean: their average. min: the lowest. mean_minus_std, mean_minus_variance: the average less coef times their
    standard deviation or variance."""
    coef: float = setting(1.0, ge=0)
    """mean_minus_std, mean_minus_variance: weight of the members' disagreement."""

    def check(self) -> None:
        if self.combine in ("mean", "min"):
            refuse_changed(self, ("coef",), f"does not apply to {key('combine')}={self.combine}; drop it")


@dataclass(frozen=True)
class EnsembleConfig(CombineConfig):
    """Several reward models that score as one."""

    paths: list[str] = field(default_factory=list)
    """Folders or hub ids of the members, each with zero and unit of its own in its config."""

    def check(self) -> None:
        super().check()
        refuse(not self.paths, "paths", "must name the reward models of the ensemble")
        twice = [path for path in self.paths if self.paths.count(path) > 1]
        refuse(bool(twice), "paths", f"names a reward model twice, which adds nothing: {twice[:1]}")


@dataclass(frozen=True)
class RewardPart(Section):
    """One part of a reward that is a weighted sum: a name, a weight, and one source of scores."""

    name: str = ""
    """Name in the metrics: reward/<name> is the mean of its scores, without the weight."""
    weight: float = 1.0
    """What its score is multiplied by; below 0 a penalty, at 0 it is measured only."""
    path: str | None = None
    """Folder or hub id of a reward model."""
    ensemble: EnsembleConfig | None = None
    """Several reward models as one."""
    function: str | None = None
    """Python callable as module:function; it gets a list of drpo.rewards.Completion and returns one number each."""
    recipe: str | None = None
    """Settings file of `function`, which then is called once, with this path, and returns the callable that scores."""
    length: Literal["tokens", "relative"] | None = None
    """tokens: the number of response tokens. relative: (length - reference length) / reference length, in characters
    of text; the data needs references."""
    format: str | None = None
    """Regular expression; 1 where the whole response matches it, surrounding white space aside, else 0."""

    @property
    def kind(self) -> str | None:
        """The setting that names its source."""
        kinds = ("path", "ensemble", "function", "length", "format")
        return next((name for name in kinds if getattr(self, name) is not None), None)

    def check(self) -> None:
        rule = f"must be letters, digits, '_', '-' and '.', for the metric reward/<name>, got {self.name!r}"
        refuse(PART_NAME.fullmatch(self.name) is None, "name", rule)
        given = [name for name in self.changed() if name not in ("name", "weight", "recipe")]
        rule = "needs one source of scores: path, ensemble, function, length or format"
        refuse(not given, "name", f"({self.name}) {rule}")
        rule = f"cannot be given together with {key(given[-1])}; make it a part of its own"
        refuse(len(given) > 1, given[0], rule)
        refuse(
            self.recipe is not None and self.function is None, "recipe", f"is for {key('function')}; drop it"
        )
        if self.format is not None:
            try:
                re.compile(self.format)
            except re.error as error:
                refuse(True, "format", f"is not a regular expression: {error}: {self.format!r}")
