"""The label page's server over real HTTP: what it lets in, what it lets out, and several people at a time."""

from __future__ import annotations

import json
import resource
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from label_runs import BETTER, WORSE, Client, better_slot, matchups, queue, serving

from eval.labelling.label_server import MAX_BODY, LabelServer, is_loopback
from eval.labelling.labels import read_labels


@pytest.fixture
def path(tmp_path):
    return tmp_path / "labels.jsonl"


@pytest.fixture
def server(path):
    with serving(queue(path)) as running:
        yield running


@pytest.fixture
def client(server):
    return Client(server.url)


def raw(server: LabelServer, request: bytes) -> bytes:
    """What comes back for these bytes, until the server ends the connection."""
    with socket.create_connection(server.server_address, timeout=20) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


# --- what comes out -----------------------------------------------------------------------------------------


def test_no_answer_ever_names_a_system(client, path):
    state = client.state()
    while state["pair"]:
        pair = state["pair"]
        _, state = client.label(pair["id"], "skip" if state["done"] == 2 else better_slot(pair))
        client.label(pair["id"], "tie")  # refused: there is one already
    _, state = client.undo(state["undo"])
    client.label(state["pair"]["id"], "tie")
    for file in ("/page.js", "/page.css", "/nothing", "/api/state"):
        client.request("GET", file)
    assert b" topic000 is late" in client.seen
    for name in (BETTER, WORSE, "zebra", "walrus", str(path.parent)):
        assert name.encode() not in client.seen
    assert {label.system_a for label in read_labels(path)} == {BETTER}


def test_headers_of_every_answer(client):
    for method, place in (("GET", "/"), ("GET", "/page.js"), ("GET", "/nothing"), ("PUT", "/")):
        _, headers, _ = client.request(method, place)
        policy = headers["content-security-policy"]
        assert (
            "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        )
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "python" not in headers["server"].lower()


def test_the_token_is_new_at_each_start(client, tmp_path):
    with serving(queue(tmp_path / "other.jsonl")) as other:
        assert len(client.token) >= 32 and Client(other.url).token != client.token


def test_it_listens_on_the_loopback_interface(server):
    assert server.server_address[0] == "127.0.0.1" and server.url.startswith("http://127.0.0.1:")
    assert [is_loopback(h) for h in ("127.0.0.1", "127.1.2.3", "::1", "localhost")] == [True] * 4
    assert [is_loopback(h) for h in ("0.0.0.0", "192.168.1.2", "example.org", "")] == [False] * 4


# --- what is refused ----------------------------------------------------------------------------------------


def test_another_host_name_is_refused(client, path):
    """DNS rebinding: a page of evil.example that resolves to 127.0.0.1."""
    pair = client.state()["pair"]["id"]
    values = {"annotator": "anna", "pair": pair, "choice": "tie", "seconds": 1}
    for host in (
        "evil.example",
        f"evil.example:{client.port}",
        "127.0.0.1.evil.example",
        "",
        "[",
        "::1",
        "127.0.0.2",
    ):
        status, error = client.call("/api/label", values, {"Host": host})
        assert status == 403 and "open http://127.0.0.1" in error["error"], host
        assert client.request("GET", "/", headers={"Host": host})[0] == 403
    assert path.read_bytes() == b""
    for host in (f"localhost:{client.port}", "LOCALHOST", "127.0.0.1:9", "[::1]:80"):
        assert client.request("GET", "/", headers={"Host": host})[0] == 200, host


def test_two_host_headers_or_none_are_refused(server):
    for hosts in (b"", b"Host: 127.0.0.1\r\nHost: 127.0.0.1\r\n"):
        assert b" 403 " in raw(server, b"GET / HTTP/1.1\r\n" + hosts + b"\r\n").splitlines()[0]


@pytest.mark.parametrize("token", ["", "wrong", "\u00e9" * 43], ids=["none", "wrong", "not ASCII"])
def test_a_wrong_token_is_refused(client, path, token):
    pair = client.state()["pair"]["id"]
    values = {"annotator": "anna", "pair": pair, "choice": "tie", "seconds": 1}
    for place, sent in (
        ("/api/label", values),
        ("/api/undo", {"annotator": "anna", "pair": pair}),
        ("/api/state?annotator=anna", None),
    ):
        status, error = client.call(place, sent, {"X-Label-Token": token})
        assert (status, "load it again" in error["error"]) == (403, True)
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "body, status, message",
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 4000, 400, "not JSON"),
        (b"[]", 400, "annotator, choice, pair, seconds"),
        (b'{"annotator": "anna"}', 400, "annotator, choice, pair, seconds"),
        (b'{"annotator":"anna","pair":"x","choice":"tie","seconds":1,"winner":"a"}', 400, "nothing else"),
        (b'{"annotator":"anna","pair":"x","choice":"tie","seconds":1}', 404, "no such pair"),
        (b'{"annotator":"anna","pair":"x","choice":"tie","seconds":NaN}', 400, "seconds"),
        (b'{"annotator":" ","pair":"x","choice":"tie","seconds":1}', 400, "name is empty"),
        (b'{"annotator":"<img src=x>","pair":"x","choice":"tie","seconds":1}', 400, "not an annotator"),
        (b" " * (MAX_BODY + 1), 413, "must not exceed"),
        (b" " * 3_000_000, 413, "must not exceed"),
    ],
)
def test_malformed_bodies_are_refused(client, path, body, status, message):
    headers = {"X-Label-Token": client.token, "Content-Type": "application/json"}
    got, _, answer = client.request("POST", "/api/label", body, headers)
    assert got == status and message in json.loads(answer)["error"]
    assert path.read_bytes() == b"" and client.state()["done"] == 0


def test_other_kinds_of_requests_are_refused(client, server, path):
    token = {"X-Label-Token": client.token}
    body = json.dumps({"annotator": "anna", "pair": client.state()["pair"]["id"]}).encode()
    assert client.request("POST", "/api/label", body, {**token, "Content-Type": "text/plain"})[0] == 415
    assert client.request("POST", "/api/label", body, token)[0] == 415  # as a form would send it
    assert client.request("GET", "/api/label", None, token)[0] == 405
    assert client.request("POST", "/", body, token)[0] == 405
    assert client.request("POST", "/nowhere", body, token)[0] == 404
    for method in ("PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "PATCH"):
        assert client.request(method, "/api/label", None, token)[0] == 405, method
    for place in ("/../labels.py", "/label_page/page.html", "/%2e%2e/labels.py", "//etc/passwd", "/page.js/"):
        assert client.request("GET", place)[0] == 404, place
    host = b"Host: 127.0.0.1\r\n"
    for head, status in (
        (b"POST /api/label HTTP/1.1\r\n" + host, b"411"),
        (b"POST /api/label HTTP/1.1\r\nContent-Length: -1\r\n" + host, b"411"),
        (b"POST /api/label HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n" + host, b"413"),
        (b"POST /api/label HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + host, b"411"),
        (b"POST /api/label HTTP/1.1\r\nContent-Length: 50\r\n" + host, b"400"),  # and nothing follows
        (b"GET /a b HTTP/1.1\r\n" + host, b"400"),
        (b"nonsense\r\n" + host, b"400"),
        (b"GET / HTTP/9.9\r\n" + host, b"505"),
    ):
        answer = raw(server, head + b"\r\n")
        assert answer.startswith(b"HTTP/1.1 " + status) and answer.count(b"Server: ") == 1, head
    assert path.read_bytes() == b"" and client.state()["done"] == 0


def test_an_address_that_is_none_is_refused(server, capfd):
    for method in (b"GET", b"POST"):
        head = f" http://[x HTTP/1.1\r\nHost: {server.url[7:-1]}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        answer = raw(server, method + head.encode())
        assert answer.startswith(b"HTTP/1.1 400") and b"the address cannot be read" in answer
    assert capfd.readouterr().err == ""


def test_names_in_the_address(client):
    for query, status in (
        ("?annotator=anna", 200),
        ("?annotator=Jos%C3%A9", 200),
        ("", 400),
        ("?annotator=", 400),
        ("?annotator=anna&annotator=ben", 400),
        ("?annotator=%ff", 400),
        ("?annotator=%3Cb%3E", 400),
    ):
        assert client.call(f"/api/state{query}")[0] == status, query


def test_only_the_named_annotators_where_there_are_names(path):
    with serving(queue(path, annotators=["anna", "ben"])) as server:
        client = Client(server.url)
        assert client.state()["annotator"] == "anna"
        status, error = client.call("/api/state?annotator=eve")
        assert (status, error["error"]) == (403, "this run has no annotator eve")


def test_a_label_that_cannot_be_written_is_told_and_not_counted(client, path):
    """The system lets no file grow."""
    pair = client.state()["pair"]["id"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        status, error = client.label(pair, "tie")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 500 and "could not be written" in error["error"]
    assert client.state()["done"] == 0 and path.read_bytes() == b""
    assert client.label(pair, "tie")[0] == 200


def test_a_server_that_is_ending_takes_no_label(path):
    full = queue(path)
    with serving(full) as server:
        client = Client(server.url)
        pair = client.state()["pair"]["id"]
        full.close()
        status, error = client.label(pair, "tie")
        assert status == 500 and "the server has ended" in error["error"] and client.state()["done"] == 0
    assert path.read_bytes() == b""


# --- several at a time ------------------------------------------------------------------------------------


def test_annotators_at_the_same_time_lose_and_double_nothing(path):
    """Four people, two windows each; both windows of a person answer the same pair at the same moment."""
    compared, names = matchups(12), ["anna", "ben", "carl", "dora"]
    start = threading.Barrier(2 * len(names))

    def label_everything(url: str, name: str) -> list[int]:
        client, statuses = Client(url, name), []
        start.wait(timeout=30)
        state = client.state()
        while state["pair"]:
            status, state = client.label(state["pair"]["id"], better_slot(state["pair"]))
            statuses.append(status)
            state = client.state()
        return statuses

    with serving(queue(path, compared)) as server, ThreadPoolExecutor(8) as pool:
        done = list(pool.map(label_everything, [server.url] * 8, names * 2))
    assert set().union(*done) <= {200, 409}
    labels = read_labels(path)
    assert len(labels) == 4 * 12
    for name in names:
        own = [label for label in labels if label.annotator == name]
        assert sorted(label.prompt_id for label in own) == sorted(c.prompt_id for c in compared)
        assert {label.winner for label in own} == {"a"}
    assert sum(statuses.count(200) for statuses in done) == 4 * 12


def test_one_press_of_undo_takes_back_one_label_however_often_it_is_sent(client, path):
    state = client.state()
    for _ in range(3):
        _, state = client.label(state["pair"]["id"], "tie")
    with ThreadPoolExecutor(6) as pool:
        statuses = [status for status, _ in pool.map(client.undo, [state["undo"]] * 6)]
    assert sorted(statuses) == [200, *[409] * 5]
    assert client.state()["done"] == 2
