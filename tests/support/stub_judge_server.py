"""An OpenAI-compatible server on a real socket whose judge is a Python function, and which can fail in every way.

    with StubServer(longer_wins) as server: ...   # server.url, server.chats

A behaviour gets what the judge was shown and how often the same request came before, and returns "A", "B" or "tie"
(answered in the form that was asked for), a text, or a Reply.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-stub"
MODEL = "stub-judge"


@dataclass(frozen=True)
class Shown:
    """What stands in a judge prompt, found by the markers whose code the system message names."""

    material: str
    a: str
    b: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """An HTTP answer; `wait` seconds before it, `hang` until the server closes, `drop` the connection."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0
    hang: bool = False
    drop: bool = False


@dataclass
class Chat:
    """One request to judge and what became of it."""

    body: dict[str, Any]
    text: str
    start: float
    reply: Any = None
    answered: bool = False


Behaviour = Callable[[Shown, int], Any]


def shown_in(body: dict[str, Any]) -> Shown:
    system, user = (message["content"] for message in body["messages"])
    code = re.search(r"hold the code ([0-9a-f]+);", system).group(1)
    texts = re.findall(rf"\[BEGIN [A-Z ]+ {code}\]\n(.*?)\n\[END [A-Z ]+ {code}\]", user, re.DOTALL)
    assert len(texts) == 3, f"{len(texts)} sections in {user}"
    return Shown(*texts, body)


def chat_completion(
    content: str | None, finish_reason: str = "stop", refusal: str | None = None, usage: dict | None = None
) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": f"{MODEL}-2026-01-01",
        "system_fingerprint": "fp_1",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}],
        "usage": usage or {"prompt_tokens": 400, "completion_tokens": 30, "total_tokens": 430},
    }


def verdict_text(body: dict[str, Any], verdict: str) -> str:
    """A verdict in the form that the request asks for."""
    if "response_format" in body:
        return json.dumps({"comparison": "One is better.", "preferred": verdict})
    label = re.search(r"^([\w ]+): <\"A\"", body["messages"][1]["content"], re.MULTILINE).group(1)
    return f"Comparison: One is better.\n{label}: {verdict}"


def unescaped(values: Any) -> str:
    """JSON as most servers write it, with escapes only where UTF-8 has no choice."""
    try:
        return json.dumps(values, ensure_ascii=False).encode().decode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(values)


def error(status: int, message: str, code: str | None = None, param: str | None = None, **headers) -> Reply:
    body = {"error": {"message": message, "type": "error", "param": param, "code": code}}
    return Reply(status, body, {name.replace("_", "-"): str(value) for name, value in headers.items()})


# --- behaviours -----------------------------------------------------------------------------------------


def first_slot_wins(shown: Shown, count: int) -> str:
    return "A"


def longer_wins(shown: Shown, count: int) -> str:
    return "A" if len(shown.a) > len(shown.b) else "B"


def more_of_the_post_wins(shown: Shown, count: int) -> str:
    """A judge that keeps to the markers and counts how many long words of the material a response takes up."""

    def overlap(text: str) -> int:
        words = set(re.findall(r"\w{6,}", shown.material.lower()))
        return len(words & set(re.findall(r"\w{6,}", text.lower())))

    a, b = overlap(shown.a), overlap(shown.b)
    return "tie" if a == b else ("A" if a > b else "B")


def in_turn(*replies: Any) -> Behaviour:
    """The replies in the order of the requests, whichever they are; the last one from then on."""
    lock, left = threading.Lock(), list(replies)

    def behave(shown: Shown, count: int) -> Any:
        with lock:
            reply = left.pop(0) if len(left) > 1 else left[0]
        return reply(shown, count) if callable(reply) else reply

    return behave


def at_first(*replies: Any, then: Behaviour) -> Behaviour:
    """Each request gets the replies one after another, then a real answer."""
    return lambda shown, count: replies[count] if count < len(replies) else then(shown, count)


# --- server ---------------------------------------------------------------------------------------------


class StubServer:
    """Serves /models, /chat/completions, /files and /batches under `url`; `chats` is the log of questions."""

    def __init__(
        self,
        behaviour: Behaviour = first_slot_wins,
        models: dict[str, str | None] | None = None,
        key: str | None = KEY,
        unsupported: tuple[str, ...] = (),
        tells_models: bool = True,
        batch_plan: Callable[[int, list[dict]], dict[str, Any]] | None = None,
        headers: dict[str, str] | None = None,
        replies: dict[str, Reply] | None = None,
    ) -> None:
        self.behaviour, self.key, self.unsupported = behaviour, key, unsupported
        self.models = {MODEL: None} if models is None else models
        self.tells_models, self.batch_plan, self.headers = tells_models, batch_plan, headers or {}
        self.replies = replies or {}  # to other paths than questions
        self.chats: list[Chat] = []
        self.paths: list[str] = []
        self.files: dict[str, str] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def __enter__(self) -> StubServer:
        handler = type("Handler", (_Handler,), {"stub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def answered_texts(self) -> list[str]:
        """The user messages that were answered, as often as they were."""
        with self.lock:
            return [chat.text for chat in self.chats if chat.answered]

    def texts(self) -> list[str]:
        with self.lock:
            return [chat.text for chat in self.chats]

    # --- what it says -----------------------------------------------------------------------------------

    def judge(self, body: dict[str, Any]) -> tuple[Chat, Reply]:
        text = body["messages"][-1]["content"]
        with self.lock:
            count = sum(chat.text == text for chat in self.chats)
            chat = Chat(body, text, time.monotonic())
            self.chats.append(chat)
        if body["model"] not in self.models:
            reply = error(404, f"The model {body['model']} does not exist", "model_not_found")
        elif bad := [name for name in self.unsupported if name in body]:
            reply = error(400, f"Unsupported value: {bad[0]!r}", "unsupported_value", bad[0])
        else:
            said = self.behaviour(shown_in(body), count)
            if isinstance(said, str):
                text = verdict_text(body, said) if said in ("A", "B", "tie") else said
                said = Reply(body=chat_completion(text))
            reply = said
        chat.reply = reply
        return chat, reply

    def make_batch(self, request: dict[str, Any]) -> dict[str, Any]:
        rows = [json.loads(line) for line in self.files[request["input_file_id"]].splitlines()]
        number = len(self.batches)
        plan = {"status": "completed", "answer": len(rows), "polls": 1, "errors": None}
        if self.batch_plan is not None:
            plan |= self.batch_plan(number, rows)
        output, errors = [], []
        for row in rows[: plan["answer"]] if plan["status"] != "failed" else []:
            chat, reply = self.judge(row["body"])
            chat.answered = reply.status == 200
            response = {"status_code": reply.status, "request_id": "req_b", "body": reply.body}
            answer = {"custom_id": row["custom_id"], "response": response, "error": None}
            line = unescaped(answer)
            (output if reply.status == 200 else errors).append(line)
        for row in rows[plan["answer"] :]:
            failure = {"code": "batch_expired", "message": "not in time"}
            errors.append(json.dumps({"custom_id": row["custom_id"], "response": None, "error": failure}))
        batch = {
            "id": f"batch_{number}",
            "object": "batch",
            "endpoint": request["endpoint"],
            "completion_window": request["completion_window"],
            "input_file_id": request["input_file_id"],
            "created_at": 1,
            "metadata": request.get("metadata"),
            "status": "in_progress",
            "polls": plan["polls"],
            "final": {
                "status": plan["status"],
                "output_file_id": self.keep_file("\n".join(output)) if output else None,
                "error_file_id": self.keep_file("\n".join(errors)) if errors else None,
                "errors": plan["errors"],
                "request_counts": {"completed": len(output), "failed": len(errors), "total": len(rows)},
            },
        }
        self.batches[batch["id"]] = batch
        return batch

    def keep_file(self, content: str) -> str:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return name

    def poll(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch["polls"] -= 1
        return {**batch, **(batch["final"] if batch["polls"] <= 0 else {})}


class _Handler(BaseHTTPRequestHandler):
    stub: StubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        self._serve(self.rfile.read(int(self.headers["Content-Length"])))

    def _serve(self, content: bytes) -> None:
        stub = self.stub
        path = self.path.partition("?")[0]
        with stub.lock:
            stub.paths.append(f"{self.command} {path}")
        if stub.key is not None and self.headers.get("Authorization") != f"Bearer {stub.key}":
            self._send(error(401, "Incorrect API key provided", "invalid_api_key"))
            return
        chat = None
        if path == "/v1/chat/completions":
            chat, reply = stub.judge(json.loads(content))
        else:
            reply = self._other(path, content)
        if reply.hang:
            stub.closing.wait()
        if reply.drop or reply.hang:
            self.close_connection = True
            return
        stub.closing.wait(reply.wait)
        if chat is not None:
            chat.answered = reply.status == 200
        self._send(reply)

    def _other(self, path: str, content: bytes) -> Reply:
        stub, parts = self.stub, path.removeprefix("/v1/").split("/")
        if path in stub.replies:
            return stub.replies[path]
        match (self.command, *parts):
            case ("GET", "models") if stub.models:
                return Reply(body={"object": "list", "data": [_model(m, d) for m, d in stub.models.items()]})
            case ("GET", "models", name) if name in stub.models and stub.tells_models:
                return Reply(body=_model(name, stub.models[name]))
            case ("POST", "files"):
                part = re.search(rb'name="file".*?\r\n\r\n(.*?)\r\n--', content, re.DOTALL).group(1)
                return Reply(body=_file(stub.keep_file(part.decode())))
            case ("GET", "files", name, "content"):
                return Reply(body=stub.files[name])
            case ("POST", "batches"):
                return Reply(body=stub.make_batch(json.loads(content)))
            case ("GET", "batches"):
                batches = [{**batch, "final": None} for batch in stub.batches.values()]
                return Reply(body={"object": "list", "data": batches, "has_more": False})
            case ("GET", "batches", name):
                return Reply(body=stub.poll(stub.batches[name]))
        return error(404, f"nothing at {path}")

    def _send(self, reply: Reply) -> None:
        text = isinstance(reply.body, str)
        content = (reply.body if text else json.dumps(reply.body)).encode()
        try:
            self.send_response(reply.status)
            headers = {
                "Content-Type": "text/html" if text else "application/json",
                "Content-Length": str(len(content)),
                "x-request-id": "req_1",
                **self.stub.headers,
                **reply.headers,
            }
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):  # the client went away: timeouts, kills
            self.close_connection = True


def _model(name: str, shutdown_date: str | None) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 1, "owned_by": "stub", "shutdown_date": shutdown_date}


def _file(name: str) -> dict[str, Any]:
    known = {"bytes": 1, "created_at": 1, "filename": "f.jsonl", "purpose": "batch", "status": "processed"}
    return {"id": name, "object": "file", **known}
