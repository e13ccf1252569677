"""Requests to servers over real sockets: those that are away or busy, proxies, certificates, answers in words."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from reward_servers import StubServer, free_port

from drpo.config import ConfigError
from drpo.servers import ServerClient

LIMIT = "some.timeout_minutes=1"


@pytest.fixture
def client() -> Iterator[ServerClient]:
    client = ServerClient("some.url", LIMIT, 1, 4, "s3cret")
    yield client
    client.close()


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_asked_again_until_it_answers(client, status):
    answers = [(status, b"full"), (status, b"full"), (200, {"scores": [1.0]})]
    with StubServer(lambda path, body: answers.pop(0)) as server:
        answer = client.request("POST", server.url, "/score", b"[1]", until=soon())
    assert client.values(answer, "here", str) == {"scores": [1.0]}
    assert server.requests == [("/score", [1])] * 3
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer s3cret"}


def test_a_server_that_stays_busy_or_away_is_told_with_the_limit(client):
    with StubServer(lambda path, body: (503, b"full")) as server:
        with pytest.raises(ConfigError) as caught:
            client.request("GET", server.url, "/info?all", until=soon(0.4))
    assert str(caught.value).startswith(
        f"some.url: {server.url} does not answer /info (waited {LIMIT}): it is busy (503: full); start the server"
    )
    with pytest.raises(ConfigError, match=f"does not answer / .waited {LIMIT}"):
        client.request("GET", f"http://127.0.0.1:{free_port()}", "", until=soon(0.4))


def test_a_request_that_is_made_once_gets_its_answer_whatever_it_is(client):
    with StubServer(lambda path, body: (503, b"full")) as server:
        answer = client.request("POST", server.url, "/update", until=None, seconds=5.0)
    assert len(server.requests) == 1
    with pytest.raises(ConfigError, match="some.url: here answers 503: full, says 503"):
        client.values(answer, "here", lambda status: f", says {status}")
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ConfigError, match=f"some.url: {url} does not answer /update: .*Connection"):
        client.request("POST", url, "/update", until=None, seconds=5.0)


def test_a_try_ends_with_its_own_seconds_or_with_the_wait(client):
    released = threading.Event()

    def hanging(path, body):
        released.wait(60)
        return 200, {}

    with StubServer(hanging) as server:
        try:
            for seconds in (0.2, None):
                with pytest.raises(ConfigError, match="(?i)timed out"):
                    client.request("GET", server.url, "/info", until=soon(0.1), seconds=seconds)
        finally:
            released.set()


def test_closing_ends_a_wait(client):
    threading.Timer(0.3, client.close).start()
    with pytest.raises(ConfigError, match="some.url: another request has failed"):
        client.request("GET", f"http://127.0.0.1:{free_port()}", "/info", until=soon())


def test_the_bundle_of_the_environment_holds_the_certificates(monkeypatch, tmp_path):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    client = ServerClient("some.url", LIMIT, 1, 4, None)
    with pytest.raises(ConfigError, match="some.url: https://127.0.0.1:9 does not answer /info: .*none.pem"):
        client.request("GET", "https://127.0.0.1:9", "/info", until=soon())


def test_no_proxy_of_the_environment_is_asked(monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("no_proxy", "")
    client = ServerClient("some.url", LIMIT, 1, 4, None)
    with StubServer(lambda path, body: (200, 5)) as server:
        assert client.values(client.request("GET", server.url, "/info", until=soon()), "here", str) == 5


def test_an_answer_that_is_no_json_is_shown(client):
    answers = [(200, b"<html>"), (200, b"")]
    with StubServer(lambda path, body: answers.pop(0)) as server:
        first, empty = (client.request("GET", server.url, "/info", until=soon()) for _ in range(2))
    with pytest.raises(ConfigError, match="here answers with something else than JSON: '<html>'"):
        client.values(first, "here", str)
    assert client.values(empty, "here", str) is None
