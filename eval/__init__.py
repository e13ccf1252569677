"""Evaluate trained policies: complete prompts, judge responses, compare systems, report.

    from eval import CompareRecipe, compare
    compare(CompareRecipe(systems=[{"name": "DR-PO", "policies": ["runs/drpo/policy"]}], ...))

docs/python.md is a tour. Names listed here are imported on first use.
"""

from drpo.contents import lazy

_CONTENTS = {
    "complete": "eval.completions.complete",
    "CompleteRecipe": "eval.completions.recipe",
    "judge": "eval.judging.judge_systems",
    "JudgeRecipe": "eval.judging.judge_systems",
    "compare": "eval.comparing.compare",
    "CompareRecipe": "eval.comparing.recipe",
    "evaluate_reward_model": "eval.reward_models.evaluate",
    "EvaluateRewardModelRecipe": "eval.reward_models.recipe",
    "report": "eval.reporting.report",
}

__all__ = list(_CONTENTS)
__getattr__ = lazy("eval", _CONTENTS)


def __dir__() -> list[str]:
    return __all__
