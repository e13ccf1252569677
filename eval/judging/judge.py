"""The interface of judges, and what a kind of judge provides to be chosen in a recipe.

A judge takes questions (a matchup and an order) and yields one verdict for each, in any order:

    async for verdict in judge.verdicts(questions): ...

A kind of judge is one module that contains its settings, its prompt and parser (where it has them), and a function
that makes the judge: a `JudgeKind`. The registry of kinds is `judges`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from drpo.config import Section
from eval.judging.matchup import Question
from eval.judging.verdict import Verdict
from eval.progress import Say

if TYPE_CHECKING:
    from eval.judging.judge_systems import JudgeRecipe
    from eval.judging.openai.store import Call, Ledger


class JudgeStopped(Exception):
    """The run cannot continue without user action. Answers are kept, and a rerun resumes from there."""

    def __init__(self, reason: str, param: str | None = None) -> None:
        super().__init__(reason)
        self.param = param
        "The setting that the API refused, if it was one."


@dataclass(frozen=True)
class Outcome:
    """The answers of a judge, and their cost."""

    verdicts: Sequence[Verdict]
    stopped: JudgeStopped | None = None
    "Why there are no more verdicts, if some are missing."
    calls: Sequence[Call] = ()
    "The calls of a judge that is paid per call."
    ledger: Ledger | None = None


class Judge(Protocol):
    """Anything that compares responses."""

    def verdicts(self, questions: Sequence[Question]) -> AsyncIterator[Verdict]:
        """Yield one verdict for each question. Raises JudgeStopped, after all verdicts that are still available."""

    def stop(self, reason: str) -> None:
        """Send no more requests; `verdicts` waits for those in flight, keeps them, and raises JudgeStopped."""


# --- kinds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JudgeSettings(Section):
    """Base of the settings of each kind; its subclasses together are the section `judge` of a recipe."""

    kind: str = "openai"
    """The kind of judge."""


@dataclass(frozen=True)
class JudgeKind:
    """A kind of judge: its settings and how it answers the questions of a recipe."""

    settings: type[JudgeSettings]
    ask: Callable[[JudgeRecipe, Sequence[Question], Say], Outcome]
    "`asked_by(make)` (eval/judging/collect.py) where a function makes the judge from its settings."
    named_by: str
    "The setting that names the judge in results."
    recipe_keys: tuple[str, ...] = ()
    "Keys of the recipe, outside `judge`, that apply to this kind and not to every kind."
    check_recipe: Callable[[JudgeRecipe], None] = lambda recipe: None
    "Raises ConfigError for a recipe that does not fit the kind."
