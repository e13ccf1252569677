"""The seam of judges: a kind is one module and a name, its settings apply to it alone, old recipes load as before."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, fields
from typing import get_args, get_type_hints

import pytest
import yaml

from drpo.config import ConfigError, load_recipe, setting
from drpo.config_help import help_text
from eval.completions.rows import CompletionRow, CompletionsWriter, prompt_id_of
from eval.judging import judges
from eval.judging.collect import asked_by
from eval.judging.judge import JudgeKind, JudgeSettings
from eval.judging.judge_systems import JudgeRecipe, judge
from eval.judging.judges import KINDS, JudgeConfig
from eval.judging.judgments import read_verdicts
from eval.judging.matchup import Question
from eval.judging.verdict import Verdict, verdict_on


def test_registry_and_section_agree():
    assert set(get_args(get_type_hints(JudgeConfig)["kind"])) == set(KINDS)
    for kind in KINDS.values():
        assert issubclass(JudgeConfig, kind.settings)
        assert kind.named_by in {field.name for field in fields(kind.settings)}
        assert set(kind.recipe_keys) <= {field.name for field in fields(JudgeRecipe)}


# --- a kind of one's own ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LongerSettings(JudgeSettings):
    """Settings of a judge that is one class and two lines of registration."""

    title: str = "longer"
    margin: int = setting(0, ge=0)


class Longer:
    """Prefers the longer response."""

    def __init__(self, margin: int) -> None:
        self.margin = margin

    def stop(self, reason: str) -> None: ...

    async def verdicts(self, questions: Sequence[Question]) -> AsyncIterator[Verdict]:
        for question in questions:
            extra = len(question.matchup.response_a) - len(question.matchup.response_b)
            yield verdict_on(
                question, "ok", "tie" if abs(extra) <= self.margin else "a" if extra > 0 else "b"
            )


LONGER = JudgeKind(
    LongerSettings, asked_by(lambda settings, run_dir: Longer(settings.margin)), named_by="title"
)


@dataclass(frozen=True)
class WithLonger(LongerSettings, JudgeConfig):
    """The section `judge` with the further kind among its bases."""

    kind: str = "longer"

    def check(self) -> None:
        JudgeConfig.check(self)


@pytest.fixture
def longer(monkeypatch):
    monkeypatch.setitem(judges.KINDS, "longer", LONGER)


def test_pairwise_judge_of_its_own_judges_systems(longer, tmp_path):
    rows = [
        CompletionRow(system, prompt_id_of(prompt), prompt, text, True, None, 0, None)
        for prompt, texts in {"p": ("abc", "ab"), "q": ("a", "abcd")}.items()
        for system, text in zip(("x", "y"), texts, strict=True)
    ]
    CompletionsWriter(tmp_path / "completions.jsonl", {}).write(rows)
    files = [str(tmp_path / "completions.jsonl")]
    recipe = JudgeRecipe(str(tmp_path / "run"), files, "x", "y", judge=WithLonger(margin=1))
    verdicts = read_verdicts(judge(recipe, lambda text: None))
    winners = {(v.prompt_id, v.order): v.winner for v in verdicts}
    p, q = prompt_id_of("p"), prompt_id_of("q")
    assert winners == {(p, "ab"): "tie", (p, "ba"): "tie", (q, "ab"): "b", (q, "ba"): "b"}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["judge"] == "longer"


def test_own_kind_refuses_settings_of_others(longer):
    with pytest.raises(ConfigError, match="^model does not apply to kind=longer$"):
        WithLonger(model="m")
    with pytest.raises(ConfigError, match="^prompt does not apply to judge.kind=longer$"):
        JudgeRecipe(prompt="tldr-1", judge=WithLonger())


# --- recipes of before ------------------------------------------------------------------------------------

SECTION = {
    "kind": "openai",
    "model": None,
    "base_url": None,
    "api_key_env": None,
    "backend": "live",
    "form": "auto",
    "probe": True,
    "temperature": 0.0,
    "reasoning_effort": None,
    "max_output_tokens": 1024,
    "output_limit": "max_completion_tokens",
    "max_reasks": 2,
    "function": None,
    "path": None,
    "batch_size": 16,
    "dtype": "float32",
    "tie_margin": 0.0,
}
"The section as an earlier version wrote it into config.yaml, with its defaults."


@pytest.mark.parametrize(
    "given",
    [
        {"model": "m", "temperature": None, "form": "text"},
        {"kind": "reward_model", "path": "folder", "batch_size": 4, "tie_margin": 0.5},
        {"kind": "function", "function": "module:function"},
    ],
)
def test_written_section_of_before_loads(tmp_path, given):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"judge": SECTION | given}))
    loaded = load_recipe(JudgeRecipe, path, []).judge
    assert {field.name: getattr(loaded, field.name) for field in fields(loaded)} == SECTION | given
    assert loaded.name == given.get("model", given.get("path", given.get("function")))


def test_help_lists_every_key_with_its_text():
    shown = help_text(JudgeRecipe, "usage")
    for name in SECTION:
        assert f"  judge.{name}  (" in shown
    assert "openai: longest answer in tokens" in shown and "openai: a model behind" in shown
