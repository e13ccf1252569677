"""The kinds of judges, by name, and the section `judge` of a recipe that chooses one.

A new kind is a module of its own with a `JudgeKind`, and here a name in KINDS and in `kind`, and its settings among
the bases of JudgeConfig.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from drpo.config import key, refuse_changed
from eval.judging.judge import JudgeKind
from eval.judging.openai.run import OPENAI
from eval.judging.openai.settings import OpenAISettings
from eval.judging.score_judges import FUNCTION, REWARD_MODEL, FunctionSettings, RewardModelSettings

KINDS: dict[str, JudgeKind] = {"openai": OPENAI, "reward_model": REWARD_MODEL, "function": FUNCTION}


@dataclass(frozen=True)
class JudgeConfig(FunctionSettings, RewardModelSettings, OpenAISettings):
    """The judge (section `judge`): its kind, and the settings of all kinds, of which those of this one apply."""

    kind: Literal["openai", "reward_model", "function"] = "openai"
    """openai: a model behind an OpenAI-compatible API. reward_model: the response that a reward model scores higher.
    function: the same with a reward function."""

    def check(self) -> None:
        settings = KINDS[self.kind].settings
        foreign_keys = {field.name for field in fields(self)} - {field.name for field in fields(settings)}
        refuse_changed(self, foreign_keys, f"does not apply to {key('kind')}={self.kind}")
        settings.check(self)

    @property
    def name(self) -> str | None:
        """The judge's name in results."""
        return getattr(self, KINDS[self.kind].named_by)
