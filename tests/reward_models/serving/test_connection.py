"""How long the calls of a batch wait, on a clock of the test's own."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from reward_servers import StubServer

from drpo import servers
from drpo.config import ConfigError
from reward_models.serving import connection


def test_the_calls_of_a_batch_wait_up_to_one_limit(monkeypatch):
    """The first takes 40 s of the minute; the second is refused after 30 s more, and would be answered then."""
    now = [0.0]
    for module in (connection, servers):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    answers = [(40.0, 200, 1), (30.0, 503, b"full"), (0.0, 200, 2)]

    def act(path, body):
        seconds, status, answer = answers.pop(0)
        now[0] += seconds
        return status, answer

    with StubServer(act) as server:
        calls = connection.Connection(server.url, 1.0, 20.0, 1, None, threading.Event())
        with pytest.raises(ConfigError, match="waited reward.server.timeout_minutes=1.: it is busy"):
            calls.call_all([("POST", "/score", [1]), ("POST", "/score", [2])])
    assert len(answers) == 1
