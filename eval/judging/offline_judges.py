"""A judge that compares scores: a reward model's, or those of any reward function, such as the demo's true reward.

Nothing is paid, so nothing is stored: a rerun scores again. The slot of a response plays no part, so both orders
agree by construction.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from drpo.config import ConfigError
from drpo.engine import Engine, EngineConfig
from drpo.reward_functions import import_functions
from drpo.rewards import Completion, RewardFn
from eval.completions.text_completion import text_completion
from eval.judging.judge import JudgeConfig, JudgeStopped
from eval.judging.matchup import Matchup, Question
from eval.judging.verdict import Verdict, Winner, verdict_on
from reward_models.score import RewardModelScorer

CHUNK = 512
"Matchups scored together."

_Text = tuple[str, str, bool]


class ScoreJudge:
    """The response with the higher score wins; scores that differ by no more than `tie_margin` are a tie."""

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
        """The score of each different completion. Raises ValueError unless there is one number for each."""
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
            return verdict_on(question, "failed", None, f"scores {a} and {b} are not both finite")
        winner: Winner = "tie" if abs(a - b) <= self._tie_margin else ("a" if a > b else "b")
        return verdict_on(question, "ok", winner, scores=(a, b))


def _texts(matchup: Matchup) -> tuple[_Text, _Text]:
    return (
        (matchup.prompt, matchup.response_a, matchup.ended_a),
        (matchup.prompt, matchup.response_b, matchup.ended_b),
    )


def score_judge(config: JudgeConfig, run_dir: Path) -> ScoreJudge:
    """The judge of judge.kind=function or reward_model. Raises ConfigError when nothing is named."""
    if config.kind == "function":
        if config.function is None:
            raise ConfigError("judge.function must name a callable, as module:function")
        function = import_functions({"function": config.function}, "judge")["function"]
        return ScoreJudge(function, config.tie_margin)
    if config.path is None:
        raise ConfigError("judge.path must name a reward model")
    return ScoreJudge(_reward_model(config, run_dir), config.tie_margin)


def _reward_model(config: JudgeConfig, run_dir: Path) -> RewardModelScorer:
    """The reward model on texts: the responses come from anywhere, so there are no token ids to share."""
    engine = Engine(EngineConfig(trackers=[]), run_dir, seed=0, max_grad_norm=None)
    return RewardModelScorer.load(config.path, engine, config.batch_size, config.dtype, None, "judge.path")
