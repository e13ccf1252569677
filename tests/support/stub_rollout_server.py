"""What a vLLM server is to a trainer, on a real socket: it fetches weights as vLLM's workers do, and samples natively.

    with StubRolloutServer(policy) as server: ...   # server.url, server.rows

Names of routes and fields are vLLM 0.32's; tests/end_to_end/test_vllm_server.py runs the real one.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from torch import nn

from drpo.rollout.sampler import SamplingConfig, Vocabulary, sample
from drpo.rollout.vllm_servers import EXTENSION
from drpo.rollout.weight_stream import fetch_weights

CONFIG = {
    "parallel_config": {"worker_extension_cls": EXTENSION},
    "model_config": {
        "dtype": "torch.float32",
        "logprobs_mode": "processed_logprobs",
        "max_model_len": 128,
    },
}


class StubRolloutServer:
    """A copy of a model behind HTTP, with as many workers that fetch weights as are asked for."""

    def __init__(self, plain: nn.Module, num_workers: int = 1, port: int = 0, **model_config: Any) -> None:
        self.model = copy.deepcopy(plain)
        self.config = CONFIG | {"model_config": CONFIG["model_config"] | model_config}
        self.num_workers, self.version, self.rows = num_workers, "default", []
        self.failures: dict[str, int] = {}
        "Status that a path is answered with, in place of what it does."
        self.num_resets = 0
        self.finish_reason: str | None = None
        "What it says of rows, in place of that they are whole."
        self.waits = 0.0
        "Seconds before its workers fetch weights."
        self.headers: list[dict[str, str]] = []
        self._turn = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}"))

            def answer(self, body: dict[str, Any]) -> None:
                path = self.path.partition("?")[0]
                server.headers.append(dict(self.headers))
                status = server.failures.get(path, 200)
                reply = b"out of order" if status != 200 else server.act(path, body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> StubRolloutServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def act(self, path: str, body: dict[str, Any]) -> bytes:
        match path:
            case "/health":
                return b""
            case "/server_info":
                found: Any = {"vllm_config": self.config}
            case "/get_world_size":
                found = {"world_size": self.num_workers}
            case "/collective_rpc":
                assert body["method"] == "fetch_weights"
                time.sleep(self.waits)
                with ThreadPoolExecutor(self.num_workers) as pool:
                    places = [body["kwargs"]] * self.num_workers
                    weights = list(pool.map(lambda place: dict(fetch_weights(**place)), places))
                for of_worker in weights:
                    self.model.load_state_dict(of_worker)
                found = {"results": [None] * self.num_workers}
            case "/update_weight_version":
                self.version = body["new_version"]
                found = {"success": True}
            case "/reset_prefix_cache":
                self.num_resets += 1
                found = {"success": True}
            case "/inference/v1/generate":
                with self._turn:
                    found = self.generate(body["token_ids"], body["sampling_params"])
        return json.dumps(found).encode()

    def generate(self, context: list[int], params: dict[str, Any]) -> dict[str, Any]:
        self.rows.append(context)
        uniforms = torch.from_numpy(np.random.default_rng(params["seed"]).random((1, params["max_tokens"])))
        suppressed = tuple(int(token) for token in params["logit_bias"] or ())
        vocabulary = Vocabulary(0, tuple(params["stop_token_ids"]), suppressed)
        sampling = SamplingConfig(temperature=params["temperature"])
        new = sample(
            self.model, [context], [params["max_tokens"]], uniforms, sampling, vocabulary, 1, logprobs=True
        )
        content = [{"token_id": i, "logprob": p} for i, p in zip(new.tokens[0], new.logprobs[0], strict=True)]
        versions = [{"version": self.version, "start": 0, "end": len(content)}]
        choice = {"token_ids": new.tokens[0], "logprobs": {"content": content}, "weight_versions": versions}
        choice["finish_reason"] = self.finish_reason or "length"
        return {"choices": [choice]}
