"""Matchups to label, and a label server in this process with a plain HTTP client."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eval.completions.rows import prompt_id_of
from eval.judging.matchup import Matchup
from eval.judging.openai.pairwise import PROMPTS
from eval.labelling.label_queue import LabelQueue
from eval.labelling.label_server import LabelServer
from eval.labelling.labels import LabelsWriter

BETTER, WORSE = "zebra-policy", "walrus-policy"
"Names that no text of the pages holds by chance."


def matchups(num: int = 6, better: str = BETTER, worse: str = WORSE) -> list[Matchup]:
    """Posts of which `better` names the topic and `worse` does not."""
    made = []
    for i in range(num):
        post = f"POST: my topic{i:03d} is late, what now?\nTL;DR:"
        made.append(
            Matchup(prompt_id_of(post), post, better, f" topic{i:03d} is late", worse, f" it is number {i}")
        )
    return made


def queue(
    path: Path, compared: Sequence[Matchup] | None = None, ties: bool = True, **changes: Any
) -> LabelQueue:
    """A queue on the labels file `path`, which stays open."""
    compared = matchups() if compared is None else compared
    return LabelQueue(compared, LabelsWriter(path), PROMPTS["tldr-1"], ties, **changes)


class Client:
    """One annotator's connection, as the page makes it; `seen` is every byte that came back."""

    def __init__(self, url: str, annotator: str = "anna") -> None:
        self.port = int(re.search(r":(\d+)/", url)[1])
        self.annotator = annotator
        self.seen = b""
        _, _, page = self.request("GET", "/")
        self.token = re.search(rb'name="label-token" content="([^"]+)"', page)[1].decode()

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (small letters) and body of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        found = {name.lower(): value for name, value in response.getheaders()}
        self.seen += repr(found).encode() + content
        return response.status, found, content

    def call(
        self, path: str, values: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a call of the interface, with the token unless `headers` say otherwise."""
        sent = {"X-Label-Token": self.token, "Content-Type": "application/json", **(headers or {})}
        body = None if values is None else json.dumps(values).encode()
        status, _, content = self.request("GET" if body is None else "POST", path, body, sent)
        return status, json.loads(content)

    def state(self) -> dict[str, Any]:
        """What the annotator would see."""
        status, state = self.call(f"/api/state?annotator={self.annotator}")
        assert status == 200, state
        return state

    def label(self, pair: str, choice: str, seconds: float = 1.5) -> tuple[int, dict[str, Any]]:
        """Say something of a pair."""
        values = {"annotator": self.annotator, "pair": pair, "choice": choice, "seconds": seconds}
        return self.call("/api/label", values)

    def undo(self, pair: str) -> tuple[int, dict[str, Any]]:
        """Take back what was said of a pair."""
        return self.call("/api/undo", {"annotator": self.annotator, "pair": pair})


def better_slot(pair: dict[str, str]) -> str:
    """The slot with the response of the better system."""
    return "first" if pair["first"].startswith(" topic") else "second"


@contextmanager
def serving(queue: LabelQueue) -> Iterator[LabelServer]:
    """A server of the queue on a free port."""
    with LabelServer(queue) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
