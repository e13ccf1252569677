"""Judges that compare scores: a reward model's, or those of any reward function, such as the demo's true reward.

Nothing is paid, so nothing is stored: a rerun scores again. Scores do not depend on the slot, so both orders
agree by construction.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from drpo.config import key, refuse, setting
from drpo.engine import Engine, EngineConfig
from drpo.reward_functions import import_functions
from drpo.rewards import Completion, RewardFn
from eval.completions.response_scores import text_completion
from eval.judging.collect import asked_by
from eval.judging.judge import JudgeKind, JudgeSettings, JudgeStopped
from eval.judging.matchup import Matchup, Question
from eval.judging.verdict import Verdict, Winner, verdict_on
from reward_models.score import RewardModelScorer

if TYPE_CHECKING:
    from eval.judging.judge_systems import JudgeRecipe

CHUNK = 512
"Matchups scored together."

_Text = tuple[str, str, bool]


class ScoreJudge:
    """A judge by scores: the higher one wins; scores that differ by no more than `tie_margin` are a tie."""

    def __init__(self, reward_fn: RewardFn, tie_margin: float = 0.0) -> None:
        self._reward_fn, self._tie_margin = reward_fn, tie_margin
        self._stopped: JudgeStopped | None = None

    def stop(self, reason: str) -> None:
        self._stopped = JudgeStopped(reason)

    async def verdicts(self, questions: Sequence[Question]) -> AsyncIterator[Verdict]:
        for first in range(0, len(questions), CHUNK):
            if self._stopped is not None:
                raise self._stopped
            chunk = questions[first : first + CHUNK]
            scores = await asyncio.to_thread(self._score, [question.matchup for question in chunk])
            for question in chunk:
                yield self._verdict(question, scores)

    def _score(self, matchups: Sequence[Matchup]) -> dict[_Text, float]:
        """Score each different completion. Raises ValueError unless there is one number for each."""
        completions: dict[_Text, Completion] = {}
        for matchup in matchups:
            for text in _texts(matchup):
                completions[text] = text_completion(*text, matchup.reference, matchup.messages)
        scores = [float(score) for score in self._reward_fn(list(completions.values()))]
        if len(scores) != len(completions):
            raise ValueError(
                f"the reward function returned {len(scores)} scores for {len(completions)} completions"
            )
        return dict(zip(completions, scores, strict=True))

    def _verdict(self, question: Question, scores: dict[_Text, float]) -> Verdict:
        a, b = (scores[text] for text in _texts(question.matchup))
        if not (math.isfinite(a) and math.isfinite(b)):
            return verdict_on(question, "failed", None, detail=f"scores {a} and {b} are not both finite")
        winner: Winner = "tie" if abs(a - b) <= self._tie_margin else ("a" if a > b else "b")
        return verdict_on(question, "ok", winner, scores=(a, b))


def _texts(matchup: Matchup) -> tuple[_Text, _Text]:
    return (
        (matchup.prompt, matchup.response_a, matchup.ended_a),
        (matchup.prompt, matchup.response_b, matchup.ended_b),
    )


# --- kinds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreSettings(JudgeSettings):
    """The setting shared by both kinds."""

    tie_margin: float = setting(0.0, ge=0)
    """reward_model, function: scores that differ by no more than this are a tie."""


@dataclass(frozen=True)
class RewardModelSettings(ScoreSettings):
    """A reward model and how it is loaded."""

    path: str | None = None
    """reward_model: its folder or hub id."""
    batch_size: int = setting(16, ge=1)
    """reward_model: responses scored together."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """reward_model: precision."""


@dataclass(frozen=True)
class FunctionSettings(ScoreSettings):
    """A reward function."""

    function: str | None = None
    """function: module:function, a callable that scores completions, such as drpo.data.tasks.demo:true_rewards."""


def reward_model_judge(settings: RewardModelSettings, run_dir: Path) -> ScoreJudge:
    """Load a reward model as a judge of texts: responses may come from anywhere, so there are no shared token ids."""
    refuse(settings.path is None, "judge.path", "must name a reward model")
    engine = Engine(EngineConfig(trackers=[]), run_dir, seed=0, max_grad_norm=None)
    scorer = RewardModelScorer.load(
        settings.path, engine, settings.batch_size, settings.dtype, None, "judge.path"
    )
    return ScoreJudge(scorer, settings.tie_margin)


def function_judge(settings: FunctionSettings, run_dir: Path) -> ScoreJudge:
    """Import a reward function as a judge."""
    refuse(settings.function is None, "judge.function", "must name a callable, as module:function")
    function = import_functions({"function": settings.function}, "judge")["function"]
    return ScoreJudge(function, settings.tie_margin)


def _ties_allowed(recipe: JudgeRecipe) -> None:
    where = f"{key('judge.kind')}={recipe.judge.kind}"
    refuse(not recipe.ties, "ties=false", f"does not apply to {where}: equal scores are a tie")


REWARD_MODEL = JudgeKind(
    RewardModelSettings, asked_by(reward_model_judge), named_by="path", check_recipe=_ties_allowed
)
FUNCTION = JudgeKind(
    FunctionSettings, asked_by(function_judge), named_by="function", check_recipe=_ties_allowed
)
