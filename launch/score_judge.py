"""The judge that compares scores, from a recipe: a reward model's folder, or a Python callable."""

from __future__ import annotations

from pathlib import Path

from drpo.config import ConfigError
from drpo.engine import Engine, EngineConfig
from eval.judging.judge import JudgeConfig
from eval.judging.offline_judges import ScoreJudge
from launch.rewards import import_functions
from reward_models.score import RewardModelScorer


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
