"""Reward servers on real sockets: ours in a thread or in a process of its own, and stubs of other projects' shapes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import requests
import uvicorn
from tiny_runs import CLEAN, ROOT, started
from warm_python import WarmProcess

from reward_models.score import RewardModelScorer
from reward_models.serving.app import RewardServer
from reward_models.serving.rows import Limits
from reward_models.serving.served import ServedModel

LIMITS = Limits(max_rows=64, max_bytes=1 << 16, max_tokens=60)


@contextmanager
def serving(
    scorer: RewardModelScorer | ServedModel, limits: Limits = LIMITS, port: int = 0, **settings: Any
) -> Iterator[str]:
    """Serve a scorer from a thread of this process; its address."""
    served = ServedModel({"rm": scorer}, limits) if isinstance(scorer, RewardModelScorer) else scorer
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        server = uvicorn.Server(uvicorn.Config(RewardServer(served, **settings).app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_command(model: Path, port: int, *options: str, **environment: str) -> WarmProcess:
    """`drpo serve-reward-model` as a process of its own, in float32."""
    script = str(ROOT / "launch" / "serve_reward_model.py")
    command = [sys.executable, script, str(model), "--port", str(port), "--mixed-precision", "no", *options]
    return started(command, cwd=Path.cwd(), env=CLEAN | environment, err=subprocess.STDOUT)


def wait_until_up(process: WarmProcess, port: int) -> str:
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()[-3000:]
        try:
            if requests.get(f"{url}/health", timeout=5).ok:
                return url
        except requests.ConnectionError:
            time.sleep(0.1)
    raise AssertionError("the server did not come up")


class StubServer:
    """An HTTP server that answers with what `act(path, body)` returns: a status, and JSON values or raw bytes."""

    def __init__(self, act: Callable[[str, Any], tuple[int, Any]], port: int = 0) -> None:
        self.requests: list[tuple[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(content) if content else None
                server.requests.append((self.path, body))
                server.headers.append(dict(self.headers))
                status, answer = act(self.path, body)
                reply = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            do_POST = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> StubServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()
