"""The settings of a judge behind an OpenAI-compatible API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from drpo.config import key, refuse, setting
from eval.judging.judge import JudgeSettings

OPENAI_URL = "https://api.openai.com/v1"


@dataclass(frozen=True)
class OpenAISettings(JudgeSettings):
    """A model behind an API, and what is asked of it."""

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

    def check(self) -> None:
        url = self.base_url
        wrong = url is not None and not url.startswith(("http://", "https://"))
        refuse(wrong, "base_url", f"must begin with http:// or https://, got {url!r}")
        for name in ("model", "reasoning_effort"):
            value = getattr(self, name)
            refuse(value is not None and not value.strip(), name, f"must be a name or null, got {value!r}")
        rule = f"is found out by the probe; with {key('probe')}=false choose json or text"
        refuse(self.form == "auto" and not self.probe, "form=auto", rule)

    @property
    def url(self) -> str:
        """Base URL of the API."""
        return self.base_url or OPENAI_URL
