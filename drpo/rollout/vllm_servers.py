"""The rollout engine vLLM on servers: other GPUs or machines sample, with the weights of the policy in training.

    with servers.weights_of(policy):       every server has fetched the policy's weights
        servers.sample(contexts, ...)

Each answer names the version of the weights that it was sampled with. One of another version, from a server that was
restarted or that another run uses too, stops the run.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from drpo.config import ConfigError
from drpo.daemon_threads import call_each, results, start_calls
from drpo.engine import Engine
from drpo.models.adapters import merged_weights
from drpo.rollout.sampler import Generated, SamplingConfig, Vocabulary
from drpo.rollout.vllm_requests import Request, VLLMConfig, check_suppressed, generated, requests_of
from drpo.rollout.vllm_worker import WorkerExtension
from drpo.rollout.weight_stream import WeightListener, send_weights
from drpo.run.stopped import Interrupted
from drpo.servers import CONNECT_SECONDS, LEAST_SECONDS, ServerClient

EXTENSION = f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}"
DTYPES = {"bf16": torch.bfloat16, "no": torch.float32}
FINISHED = ("stop", "length")
"What vLLM says of rows that it has sampled to their end."
STARTED = "start it by launch/serve_rollouts.py (docs/rollout_engines.md)"


class VLLMServers:
    """Servers that sample from a copy of the policy's weights; every training process asks all of them."""

    def __init__(
        self, config: VLLMConfig, engine: Engine, vocabulary: Vocabulary, num_rows: int, max_tokens: int
    ) -> None:
        """Wait until all servers are up, and check how they were started.

        Raises ConfigError for one that is not up in time, or that cannot serve this run, and for a timeout that is not
        below that of the engine.

        Args:
            config: urls and timeout.
            engine: its processes, precision, and parameters that are cut over processes.
            vocabulary: stop ids, and ids that are never sampled.
            num_rows: rows that each training process asks for at a time.
            max_tokens: most tokens of a row, prompt and response.
        """
        check_suppressed(vocabulary)
        # The last try may begin at the end.
        minutes = config.timeout_minutes + (CONNECT_SECONDS + LEAST_SECONDS) / 60
        engine.check_wait(minutes, f"rollout.vllm.timeout_minutes={config.timeout_minutes:g}")
        self._config, self._engine, self._vocabulary, self._max_tokens = (
            config,
            engine,
            vocabulary,
            max_tokens,
        )
        self._urls = [url.rstrip("/") for url in config.urls]
        self._dtype = DTYPES[engine.precision]
        self._timeout = 60 * config.timeout_minutes
        self._run, self._num_updates = engine.from_main(secrets.token_hex(8)), 0
        limit = f"rollout.vllm.timeout_minutes={config.timeout_minutes:g}"
        token = os.environ.get("VLLM_API_KEY") or None
        self._client = ServerClient("rollout.vllm.urls", limit, len(self._urls), num_rows, token)
        self._num_rows, self._stop = num_rows, engine.stop_requested
        engine.at_close(self._client.close)
        self._on_main(self._check_servers)

    @property
    def _version(self) -> str:
        return f"{self._run}-{self._num_updates}"

    @contextmanager
    def weights_of(self, policy: nn.Module) -> Iterator[None]:
        """Let every server fetch the policy's weights, LoRA folded in, and forget keys and values of earlier ones.

        Weights are sent by the first process, one at a time. ZeRO-3: all processes must enter this context, outside
        `Engine.whole_weights`. Raises ConfigError on all processes when a server does not take them.
        """
        self._num_updates += 1
        weights = merged_weights(policy, self._engine.whole_parameters)
        self._on_main(lambda: self._send(weights), lambda: [None for _ in weights])
        yield

    def sample(
        self,
        contexts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        seeds: Sequence[int],
        sampling: SamplingConfig,
    ) -> Generated:
        """Sample new tokens after each context, in the order of `contexts`, a sampled stop token included.

        Log-probabilities are those of the distribution that was sampled from. Raises ValueError for a row that may
        become longer than the servers were checked for, FloatingPointError for log-probabilities that are not finite,
        ConfigError for a server that fails or has other weights.
        """
        settings = (sampling, self._vocabulary, self._max_tokens)
        asked = requests_of(contexts, max_new_tokens, seeds, *settings)
        # Rows in sequence, which share prompts, go to one server and its prefix cache; all servers begin at once.
        places = [index * len(self._urls) // len(asked) for index in range(len(asked))]
        first: dict[int, int] = {}
        turns = [index - first.setdefault(place, index) for index, place in enumerate(places)]
        order = sorted(range(len(asked)), key=turns.__getitem__)

        def ask(index: int) -> tuple[list[int], list[float]]:
            return self._ask(self._urls[places[index]], asked[index])

        answers = call_each(ask, order, self._num_rows, self._stop)
        by_row = dict(zip(order, answers, strict=True))
        return generated(len(contexts), asked, [by_row[index] for index in range(len(asked))])

    def _ask(self, url: str, request: Request) -> tuple[list[int], list[float]]:
        body = {"token_ids": request.context, "sampling_params": request.params}
        until = time.monotonic() + self._timeout
        answer = self._call("POST", url, "/inference/v1/generate", body, until)
        [choice] = answer["choices"]
        versions = {span["version"] for span in choice["weight_versions"] or ()}
        if versions != {self._version}:
            raise ConfigError(
                f"rollout.vllm.urls: {url} sampled with other weights than this run has sent "
                f"({', '.join(sorted(versions)) or 'of no version'}, not {self._version}): it was restarted, or "
                "another run uses it too; start the run again to go on from its last checkpoint"
            )
        if choice["finish_reason"] not in FINISHED:
            raise ConfigError(
                f"rollout.vllm.urls: {url} ended a row before its end (finish_reason {choice['finish_reason']}): it is "
                "being stopped; start the run again, with the server, to go on from its last checkpoint"
            )
        return choice["token_ids"], [token["logprob"] for token in choice["logprobs"]["content"]]

    def _on_main(self, action: Callable[[], None], afterwards: Callable[[], Any] = lambda: None) -> None:
        """Act on the first process, raise its failure or interruption on all; all then act `afterwards`."""
        failure, interrupted = "", False
        if self._engine.is_main:
            try:
                action()
            except (ConfigError, OSError) as error:
                failure = str(error)
            except Interrupted:
                interrupted = True
        afterwards()
        failure, interrupted = self._engine.from_main((failure, interrupted))
        if interrupted:
            raise Interrupted("the run is to stop, and a server has not taken the weights yet")
        if failure:
            raise ConfigError(failure)

    # --- on the first process ---

    def _check_servers(self) -> None:
        until = time.monotonic() + self._timeout
        for url in self._urls:
            self._call("GET", url, "/health", until=until)
            hint = f"; {STARTED}"
            answer = self._call("GET", url, "/server_info?config_format=json", until=until, hint=hint)
            config = answer.get("vllm_config", {})
            model, parallel = config.get("model_config", {}), config.get("parallel_config", {})
            for found, expected, what in (
                (parallel.get("worker_extension_cls"), EXTENSION, "the worker extension"),
                (
                    model.get("dtype"),
                    str(self._dtype),
                    f"for engine.mixed_precision={self._engine.precision} the dtype",
                ),
                (model.get("logprobs_mode"), "processed_logprobs", "logprobs_mode"),
            ):
                if found != expected:
                    raise ConfigError(
                        f"rollout.vllm.urls: {url} runs with {found or 'none'}, and {what} must be {expected}: "
                        + STARTED
                    )
            if model["max_model_len"] < self._max_tokens:
                raise ConfigError(
                    f"rollout.vllm.urls: {url} takes {model['max_model_len']} tokens, and the longest prompt with "
                    f"rollout.max_response_length has {self._max_tokens}: start it with --max-tokens {self._max_tokens}"
                )

    def _send(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Let the workers of every server fetch the weights; then name their version, and empty the prefix caches."""
        num_workers, until = 0, time.monotonic() + self._timeout
        for url in self._urls:
            num_workers += self._wait_for("GET", url, "/get_world_size", until=until)["world_size"]
            # Rows that are sampled in between are nobody's.
            self._wait_for("POST", url, "/update_weight_version", {"new_version": f"{self._version}-loading"})
        address = self._config.address or _own_address(self._urls[0], self._timeout)
        with _listener(address) as listener:
            place = {
                "address": address,
                "port": listener.port,
                "token": listener.token,
                "timeout": self._timeout,
            }
            body = {"method": "fetch_weights", "kwargs": place}

            def fetch(url: str) -> Any:
                return self._call("POST", url, "/collective_rpc", body)

            fetching = start_calls(fetch, self._urls, len(self._urls), self._stop)
            there = f"weights for {num_workers} workers, offered at {address} port {listener.port}"
            try:
                connections = listener.accept(
                    num_workers, self._timeout, lambda: self._check_fetching(fetching)
                )
            except (ConfigError, OSError) as error:
                raise ConfigError(
                    f"rollout.vllm.urls: {there}, were not fetched: {error}; the servers must reach this machine there "
                    "(rollout.vllm.address, any port)"
                ) from None
            try:
                send_weights(connections, weights, self._dtype)
            except OSError as error:
                self._check_fetching(
                    fetching
                )  # a worker that fails closes its connection; its server says why
                raise ConfigError(f"rollout.vllm.urls: {there}, did not all arrive: {error}") from None
            results(fetching, self._stop)
        for url in self._urls:
            self._wait_for("POST", url, "/update_weight_version", {"new_version": self._version})
            if not self._wait_for("POST", url, "/reset_prefix_cache")["success"]:
                raise ConfigError(
                    f"rollout.vllm.urls: {url} cannot empty its prefix cache while others use it"
                )

    def _check_fetching(self, calls: Sequence[Future]) -> None:
        for call in calls:
            if call.done():
                call.result()
        if self._stop.is_set():
            raise Interrupted("the process is to stop, and the weights are not fetched yet")

    def _wait_for(self, *arguments: Any, **options: Any) -> Any:
        """Return what `_call` returns, from a thread: in this one a signal would be handled after the wait only."""
        return call_each(lambda _: self._call(*arguments, **options), [None], 1, self._stop)[0]

    def _call(
        self,
        method: str,
        url: str,
        path: str,
        body: Any = None,
        until: float | None = None,
        hint: str = "",
    ) -> Any:
        """Return the JSON of an answer; raise ConfigError for an error or none.

        Args:
            method: of HTTP.
            url: of the server.
            path: below it.
            body: as JSON.
            until: call again while the server is away or busy, until this time of the monotonic clock; None for one
                call.
            hint: end of the message for an answer that is an error.
        """
        content = None if body is None else json.dumps(body).encode()
        seconds = self._timeout if until is None else None
        answer = self._client.request(method, url, path, content, until=until, seconds=seconds)
        place = url + path.partition("?")[0]
        return self._client.values(answer, place, lambda status: f" (its log says more){hint}")


def _listener(address: str) -> WeightListener:
    try:
        return WeightListener(address)
    except OSError as error:
        raise ConfigError(
            f"rollout.vllm.address: this machine cannot offer the weights at {address}: {error}"
        ) from None


def _own_address(url: str, timeout: float) -> str:
    """Return the address of this machine from which it reaches a server."""
    parts = urlsplit(url)
    place = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
    with socket.create_connection(place, timeout) as own:
        return own.getsockname()[0]
