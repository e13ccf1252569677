"""Completions of a policy: the same text whatever the batch size, the number of processes, and how often it stopped.

The random numbers of a response are a function of its prompt and seed alone. Batches and processes change a text only
where they change the logits themselves, by float rounding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drpo.data.encode import Example, encode_responses, said_texts
from drpo.data.records import DataError
from drpo.data.views import best_response
from drpo.engine import Engine
from drpo.models.policy_stops import stop_ids
from drpo.rollout.generator import Generator, Vocabulary, vocabulary_of
from drpo.run.same_view import require_shared_folder
from eval.completions.rows import CompletionRow, CompletionsWriter, messages_meta, prompt_id_of

Key = tuple[str, str, int]
"What no two rows share: system, prompt_id, seed."


@dataclass(frozen=True, slots=True)
class Request:
    """One response to ask for."""

    example: Example
    prompt_id: str
    seed: int


def make_requests(
    examples: Sequence[Example], num_prompts: int | None, seeds: Sequence[int]
) -> list[Request]:
    """A request for each prompt and seed, in the order of `examples`, whose prompts must differ.

    `num_prompts` takes the prompts of the smallest ids: the choice depends on no order of the data, and a smaller
    one is part of a larger one. None takes all.
    """
    by_id = {prompt_id_of(example.record.shared_prompt): example for example in examples}
    if len(by_id) < len(examples):
        raise DataError(f"{len(examples)} prompts, but only {len(by_id)} different ones")
    chosen = set(sorted(by_id)[:num_prompts])
    return [
        Request(example, prompt_id, seed)
        for prompt_id, example in by_id.items()
        if prompt_id in chosen
        for seed in seeds
    ]


def vocabulary_with(bad_tokens: Sequence[str], tokenizer: Any, policy: nn.Module) -> Vocabulary:
    """Find the ids that end a policy's response, and those that it never says. Raises ConfigError naming bad_tokens."""
    return vocabulary_of(tokenizer, policy.config.vocab_size, stop_ids(policy), bad_tokens, "bad_tokens")


@dataclass(frozen=True)
class Policy:
    """A policy to sample from, under the name that tables give it."""

    system: str
    generator: Generator

    def respond(self, requests: Sequence[Request]) -> list[CompletionRow]:
        """One row for each request, sampled with the numbers of its prompt and seed."""
        responses = self.generator.generate(
            [request.example.query_ids for request in requests],
            [self.generator.max_response_length] * len(requests),
            [(request.seed, int(request.prompt_id, 16)) for request in requests],
        ).tokens
        return [self._row(request, ids) for request, ids in zip(requests, responses, strict=True)]

    def _row(self, request: Request, ids: list[int]) -> CompletionRow:
        ended = ids[-1] in self.generator.vocabulary.stop_ids
        record, reference = request.example.record, best_response(request.example.record)
        (text,) = said_texts(self.generator.tokenizer, [ids[:-1] if ended else ids], [record.opening])
        meta = {"response_ids": ids}  # the text may be encoded otherwise
        if record.chat is not None:  # and the prompt's, by another template
            meta |= {"query_ids": list(request.example.query_ids)} | messages_meta(record)
        return CompletionRow(
            self.system,
            request.prompt_id,
            record.shared_prompt,
            text,
            ended,
            len(ids),
            request.seed,
            None if reference is None else record.said(reference),
            meta,
        )


def sample_responses(
    engine: Engine, policy: Policy, requests: Sequence[Request], done: Collection[Key]
) -> Iterator[list[CompletionRow]]:
    """Sample the requests that are not in `done`, in their order: a batch from each process at a time.

    All processes must iterate to the end, and all get all rows.
    """
    missing = [request for request in requests if _key(policy.system, request) not in done]
    size = policy.generator.batch_size * engine.world_size
    for first in range(0, len(missing), size):
        mine = list(enumerate(missing[first : first + size]))[engine.rank :: engine.world_size]
        rows = policy.respond([request for _, request in mine]) if mine else []
        placed = [(place, row) for (place, _), row in zip(mine, rows, strict=True)]
        yield [row for _, row in sorted(engine.gather_objects(placed), key=lambda item: item[0])]


def _key(system: str, request: Request) -> Key:
    return system, request.prompt_id, request.seed


def with_num_tokens(rows: Sequence[CompletionRow], tokenizer) -> list[CompletionRow]:
    """Rows of text with the number of tokens that a policy of this tokenizer would need, stop token included."""
    encoded = encode_responses(tokenizer, [row.response for row in rows])
    return [replace(row, num_tokens=len(ids)) for row, ids in zip(rows, encoded, strict=True)]


# --- one file, several processes --------------------------------------------------------------------------


def open_file(
    engine: Engine, path: Path, meta: Mapping[str, Any]
) -> tuple[CompletionsWriter | None, set[Key]]:
    """The file, to be written by the main process alone (None on the others), and the keys of its rows on every one.

    Raises DataError on every process when the file was made in another way, or with rows but no account of how;
    ConfigError when the processes do not share its folder.
    """
    require_shared_folder(engine, path.parent, "run_dir")
    writer, outcome = None, []
    if engine.is_main:
        try:
            writer = _open(path, meta)
            outcome = [sorted(writer.done)]
        except DataError as error:
            outcome = [str(error)]
    (shared,) = engine.gather_objects(outcome)
    if isinstance(shared, str):
        raise DataError(shared)
    return writer, {tuple(key) for key in shared}


def _open(path: Path, meta: Mapping[str, Any]) -> CompletionsWriter:
    if path.exists() and not path.with_suffix(".meta.json").exists():
        raise DataError(
            f"{path} is there without {path.with_suffix('.meta.json').name}: a file from "
            "elsewhere; choose another run_dir"
        )
    return CompletionsWriter(path, meta)


# --- what decides the texts -----------------------------------------------------------------------------


def weights_sha256(model: nn.Module) -> str:
    """Hash of names, types, shapes and bytes of all weights: the same however they are cut into files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def requests_sha256(requests: Sequence[Request]) -> str:
    """Hash of prompts, their token ids, references and seeds, in their order."""
    digest = hashlib.sha256()
    for request in requests:
        record = request.example.record
        line = [record.prompt, list(request.example.query_ids), best_response(record), request.seed]
        digest.update(json.dumps(line).encode() + b"\n")
    return digest.hexdigest()


def sha256_of(values: Mapping[str, Any]) -> str:
    """Hash of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
