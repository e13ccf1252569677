"""A reward model on a server (reward.url) as a RewardFn.

The run waits while the server is away, and stops after a while. A server that is started again with another model
stops it too: every answer names the model that gave it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from drpo.config import ConfigError
from drpo.engine import Engine
from drpo.models.model_folder import read_config
from drpo.models.tokenizer import load_tokenizer
from drpo.rewards import Completion
from drpo.servers import CONNECT_SECONDS
from drpo.trainers.online_recipe import RewardConfig
from reward_models.serving.connection import Call, Connection
from reward_models.serving.dialects import VLLM, Dialect, OpenRLHF, numbers, parts
from reward_models.serving.identity import template_hash, vocabulary_hash

TOKEN_VARIABLE = "DRPO_REWARD_TOKEN"
NORMALISATION = {
    "centre": 0.0,
    "scale": 1.0,
    "aggregation": "last",
    "chat_template": None,
    "chat_template_kwargs": {},
}
"Of a model from elsewhere."


class DRPO:
    """launch/serve_reward_model.py: token ids where the model shares the policy's vocabulary, else texts."""

    def __init__(self, info: dict[str, Any], config: RewardConfig, tokenizer_path: str, chat: bool) -> None:
        """Compare what is served with what the run needs. Raises ConfigError where it does not fit.

        Args:
            info: the server's answer to GET /info.
            config: the `reward` section.
            tokenizer_path: the policy's tokenizer.
            chat: whether prompts are conversations.
        """
        self.identity, self.max_bytes, self._config = info["model"], info["max_bytes"], config
        if info["chat_template"] not in (None, chat):
            raise ConfigError(
                f"reward.url: {info['name']} was trained with data.chat_template={not chat}, and the policy's prompts "
                f"are made with {chat}: give both the same"
            )
        if chat and not info["reads_chat"]:
            raise ConfigError(
                f"reward.url: the prompts are conversations, and the tokenizer of {info['name']} has no chat template "
                "that can render them; serve a reward model that has one"
            )
        if config.batch_size > info["max_rows"]:
            raise ConfigError(
                f"reward.batch_size={config.batch_size} rows in a request, and the server takes {info['max_rows']}"
            )
        if config.server.expected_path is not None:
            _check_served(info, config.server.expected_path)
        tokenizer = load_tokenizer(tokenizer_path)
        self._tokenizer_hash = info["tokenizer"]
        self._shares_tokenizer = vocabulary_hash(tokenizer) == self._tokenizer_hash
        self._shares_template = template_hash(tokenizer) == info["template"]
        self._arguments = info["chat_template_kwargs"] if info["chat_template"] else None
        self.max_tokens: int | None = info["max_tokens"] if self._shares_tokenizer else None

    def calls(self, completions: Sequence[Completion]) -> list[tuple[Call, int]]:
        calls: list[tuple[Call, int]] = []
        for part in parts(completions, self._config.batch_size):
            body = {"tokenizer": self._tokenizer_hash, "rows": [self._row(c) for c in part]}
            calls.append((("POST", "/score", body), len(part)))
        return calls

    def _row(self, completion: Completion) -> dict[str, Any]:
        chat = completion.record.chat
        if self._shares_tokenizer and (chat is None or self._shares_rendering(dict(chat.arguments))):
            ids = {"query_ids": completion.query_ids, "response_ids": completion.response_ids}
            return ids | {"ended": completion.ended, "chat": chat is not None}
        prompt = {"prompt": completion.prompt} if chat is None else {"messages": list(chat.messages)}
        return prompt | {"response": completion.response, "ended": completion.ended}

    def _shares_rendering(self, arguments: dict[str, Any]) -> bool:
        return self._shares_template and self._arguments in (None, arguments)

    def scores(self, answer: Any) -> list[float]:
        scores = numbers(answer, "scores")
        if (found := answer.get("model")) != self.identity:
            raise ConfigError(
                f"reward.url: the server has another model than at the start of this run ({found}, not "
                f"{self.identity}), or the same in another precision: serve that one, and run the same command "
                "again to go on from the last checkpoint"
            )
        return scores


class RemoteReward:
    """RewardFn that asks a server; every training process asks for its own rows."""

    def __init__(self, connection: Connection, dialect: Dialect) -> None:
        self._connection, self._dialect = connection, dialect
        connection.max_bytes = dialect.max_bytes

    @property
    def identity(self) -> str:
        """The model that is served, as far as its server says."""
        return self._dialect.identity

    @property
    def max_tokens(self) -> int | None:
        """Most tokens of the policy that the model reads; None where that is not known."""
        return self._dialect.max_tokens

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        """Return one score each. Raises ConfigError when the server fails, or is away for too long."""
        calls = self._dialect.calls(completions)
        answers = self._connection.call_all([call for call, _ in calls])
        scores: list[float] = []
        for (_, num_rows), answer in zip(calls, answers, strict=True):
            scores += (found := self._dialect.scores(answer))
            if len(found) != num_rows:
                raise ConfigError(
                    f"reward.url: {self._connection.url} gave {len(found)} scores for {num_rows} responses"
                )
        return scores


def remote_reward(
    config: RewardConfig, engine: Engine, tokenizer_path: str, chat_template: bool
) -> RemoteReward:
    """Wait for the server at `reward.url`, and return it as a RewardFn.

    Raises ConfigError on all processes when it is not up in time, what it serves does not fit the run, or a process may
    wait for it longer than the others for that process.

    Args:
        config: the `reward` section.
        engine: its processes all get the same answer.
        tokenizer_path: the policy's tokenizer.
        chat_template: whether prompts are conversations.
    """
    server = config.server
    engine.check_wait(
        # The last try may begin at the end.
        server.timeout_minutes + (CONNECT_SECONDS + server.request_seconds) / 60,
        f"reward.server.timeout_minutes={server.timeout_minutes:g} and request_seconds={server.request_seconds:g}",
    )
    token = os.environ.get(TOKEN_VARIABLE) or None
    times = server.timeout_minutes, server.request_seconds
    connection = Connection(config.url, *times, server.num_requests, token, engine.stop_requested)
    engine.at_close(connection.close)

    def dialect() -> Dialect:
        match server.kind:
            case "drpo":
                return DRPO(_info(connection), config, tokenizer_path, chat_template)
            case "openrlhf":
                return OpenRLHF(config.url, config.batch_size)
            case "vllm":
                return VLLM(connection, config.batch_size, server.model, server.stop_text)

    return RemoteReward(connection, _on_main(engine, dialect))


def _on_main(engine: Engine, function: Callable[[], Dialect]) -> Dialect:
    """Return what `function` returns on the first process, or raise its ConfigError, on all."""
    found, failure = None, ""
    if engine.is_main:
        try:
            found = function()
        except ConfigError as error:
            failure = str(error)
    found, failure = engine.from_main((found, failure))
    if failure:
        raise ConfigError(failure)
    return found


def _info(connection: Connection) -> dict[str, Any]:
    info = connection.call("GET", "/info")
    needed = {
        "model",
        "name",
        "tokenizer",
        "template",
        "reads_chat",
        "max_tokens",
        "max_rows",
        "max_bytes",
        *NORMALISATION,
    }
    if not isinstance(info, dict) or not needed <= info.keys():
        raise ConfigError(
            f"reward.url: {connection.url}/info is not that of launch/serve_reward_model.py: {str(info)[:200]}"
        )
    return info


def _check_served(info: dict[str, Any], path: str) -> None:
    """Raise ConfigError unless the server has zero, unit, chat template and vocabulary of the model at `path`."""
    key = "reward.server.expected_path"
    if "members" in info:
        raise ConfigError(
            f"{key} names one model, and the server has an ensemble ({info['name']}); set it to null"
        )
    saved = read_config(path, key)
    expected = {name: saved.get(name, default) for name, default in NORMALISATION.items()}
    tokenizer = load_tokenizer(path, key)
    expected |= {"tokenizer": vocabulary_hash(tokenizer), "template": template_hash(tokenizer)}
    for name, value in expected.items():
        if info[name] != value:
            raise ConfigError(
                f"{key}: {path!r} has {name} {value!r}, and the server's {info['name']} has {info[name]!r}; serve the "
                "model of that folder, or name the folder of the one that is served"
            )
