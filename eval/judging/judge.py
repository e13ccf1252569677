"""What a judge is, whatever stands behind it, and the recipe's section that chooses one.

A judge takes questions (a comparison and an order) and yields one verdict for each, in whatever order they come:

    async for verdict in judge.verdicts(questions): ...

`openai_judge` asks a model through an OpenAI-compatible API, `batch_api` asks it through the Batch API, and
`offline_judges` compares scores of a reward model or of any reward function. The first two share one store, so no
answer is paid twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from drpo.config import Section, key, refuse, refuse_changed, setting
from eval.judging.matchup import Question
from eval.judging.verdict import Verdict

if TYPE_CHECKING:
    from eval.judging.openai.store import Call, Ledger

OPENAI_URL = "https://api.openai.com/v1"


class JudgeStopped(Exception):
    """The run cannot go on until somebody acts. What was answered is kept, and a rerun goes on from there."""

    def __init__(self, reason: str, param: str | None = None) -> None:
        super().__init__(reason)
        self.param = param
        "The setting that the API refused, if it was one."


@dataclass(frozen=True)
class Outcome:
    """What a judge answered, and what it cost."""

    verdicts: Sequence[Verdict]
    stopped: JudgeStopped | None = None
    "Why there are no more verdicts, if some are missing."
    calls: Sequence[Call] = ()
    "The calls of a judge that is paid by the call."
    ledger: Ledger | None = None


class Judge(Protocol):
    """Whatever compares responses."""

    def verdicts(self, questions: Sequence[Question]) -> AsyncIterator[Verdict]:
        """One verdict for each question. Raises JudgeStopped, after all verdicts that could still be had."""
        ...

    def stop(self, reason: str) -> None:
        """Ask no more; what is under way is waited for and kept, then `verdicts` raises JudgeStopped."""
        ...


_OPENAI_ONLY = (
    *("model", "base_url", "api_key_env", "backend", "form", "probe", "temperature", "reasoning_effort"),
    *("max_output_tokens", "output_limit", "max_reasks"),
)
_APPLIES = {
    "openai": _OPENAI_ONLY,
    "reward_model": ("path", "batch_size", "dtype", "tie_margin"),
    "function": ("function", "tie_margin"),
}


@dataclass(frozen=True)
class JudgeConfig(Section):
    """Who judges (section `judge`)."""

    kind: Literal["openai", "reward_model", "function"] = "openai"
    """openai: a model behind an OpenAI-compatible API. reward_model: the response that a reward model scores higher.
    function: the same with a reward function."""
    model: str | None = None
    """openai: name of the model. There is no default, for models are retired."""
    base_url: str | None = None
    """openai: address of another server than OpenAI's, such as http://localhost:8000/v1."""
    api_key_env: str | None = None
    """openai: environment variable with the API key. Without base_url it is OPENAI_API_KEY; another server is sent no
    key unless one is named here."""
    backend: Literal["live", "batch"] = "live"
    """openai: one request a call, or the Batch API (cheaper, done within a day)."""
    form: Literal["auto", "json", "text"] = "auto"
    """openai: how the verdict is given: by a JSON schema, as text, or by a schema if the probe shows that the model
    keeps to one."""
    probe: bool = True
    """openai: ask one easy question first, to see that the model takes the settings and answers in the form."""
    temperature: float | None = setting(0.0, ge=0, le=2)
    """openai: sampling temperature; null sends none, for models that take none."""
    reasoning_effort: str | None = None
    """openai: how long a reasoning model thinks; null sends nothing."""
    max_output_tokens: int = setting(1024, ge=1)
    """openai: longest answer in tokens, thoughts included. A reservation in the budget is for this length."""
    output_limit: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    """openai: the API's name for that limit; some local servers know the old name only."""
    max_reasks: int = setting(2, ge=0)
    """openai: how often a question is asked again when its answer cannot be read."""
    function: str | None = None
    """function: module:function, a callable that scores completions, such as drpo.data.tasks.demo:true_rewards."""
    path: str | None = None
    """reward_model: its folder or hub id."""
    batch_size: int = setting(16, ge=1)
    """reward_model: responses scored together."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """reward_model: precision."""
    tie_margin: float = setting(0.0, ge=0)
    """reward_model, function: scores that differ by no more than this are a tie."""

    def check(self) -> None:
        names = [
            field.name
            for field in dataclasses.fields(self)
            if field.name not in ("kind", *_APPLIES[self.kind])
        ]
        refuse_changed(self, names, f"does not apply to {key('kind')}={self.kind}")
        if self.base_url is not None:
            rule = f"must begin with http:// or https://, got {self.base_url!r}"
            refuse(not self.base_url.startswith(("http://", "https://")), "base_url", rule)
        for name in ("model", "reasoning_effort"):
            value = getattr(self, name)
            refuse(value is not None and not value.strip(), name, f"must be a name or null, got {value!r}")
        rule = f"can be auto only with the probe, which finds it out; with {key('probe')}=false choose json or text"
        refuse(self.form == "auto" and not self.probe, "form", rule)

    @property
    def url(self) -> str:
        """Where requests go."""
        return self.base_url or OPENAI_URL
