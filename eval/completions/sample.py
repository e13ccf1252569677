"""Deterministic completions of a policy, independent of batch size, number of processes and interruptions.

The random numbers of a response are a function of its prompt and seed alone. Batches and processes change a text only
where float rounding changes the logits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from drpo.data.encode import Example, encode_responses, readable_texts
from drpo.data.records import DataError
from drpo.data.views import best_response
from drpo.engine import Engine
from drpo.models.policy_stops import stop_ids
from drpo.rollout.generator import Generator, Vocabulary, vocabulary_of
from drpo.run.same_view import require_shared_folder
from eval.completions.rows import CompletionRow, CompletionsWriter, messages_meta, meta_path, prompt_id_of

Item, Result = TypeVar("Item"), TypeVar("Result")
Key = tuple[str, str, int]
"Unique key of a row: system, prompt_id, seed."


@dataclass(frozen=True, slots=True)
class Request:
    """A response to sample."""

    example: Example
    prompt_id: str
    seed: int

    def key(self, system: str) -> Key:
        """Return the key of the row that answers it as `system`."""
        return system, self.prompt_id, self.seed


def make_requests(
    examples: Sequence[Example], num_prompts: int | None, seeds: Sequence[int]
) -> list[Request]:
    """Make a request for each prompt and seed, in the order of `examples`, whose prompts must differ.

    `num_prompts` selects the prompts with the smallest ids: the choice is independent of the order of the data, and
    a smaller one is a subset of a larger one. None selects all.
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
    """Find the ids that end a response, and those never sampled. Raises ConfigError naming bad_tokens."""
    return vocabulary_of(tokenizer, policy.config.vocab_size, stop_ids(policy), bad_tokens, "bad_tokens")


@dataclass(frozen=True)
class Policy:
    """A policy to sample from, with its name in tables."""

    system: str
    generator: Generator

    def respond(self, requests: Sequence[Request]) -> list[CompletionRow]:
        """Sample one row for each request, with the random numbers of its prompt and seed."""
        responses = self.generator.generate(
            [request.example.query_ids for request in requests],
            [self.generator.max_response_length] * len(requests),
            [(request.seed, int(request.prompt_id, 16)) for request in requests],
        ).tokens
        return [self._row(request, ids) for request, ids in zip(requests, responses, strict=True)]

    def _row(self, request: Request, ids: list[int]) -> CompletionRow:
        ended = ids[-1] in self.generator.vocabulary.stop_ids
        record, reference = request.example.record, best_response(request.example.record)
        (text,) = readable_texts(self.generator.tokenizer, [ids[:-1] if ended else ids], [record.opening])
        meta = {"response_ids": ids}  # encoding the text may give other ids
        if record.chat is not None:  # another template may give another prompt
            meta |= {"query_ids": list(request.example.query_ids)} | messages_meta(record)
        return CompletionRow(
            self.system,
            request.prompt_id,
            record.shared_prompt,
            text,
            ended,
            len(ids),
            request.seed,
            None if reference is None else record.without_opening(reference),
            meta,
        )


def sample_responses(
    engine: Engine, policy: Policy, requests: Sequence[Request]
) -> Iterator[list[CompletionRow]]:
    """Sample the requests in order, one batch per process at a time.

    All processes must iterate to the end, and all receive all rows.
    """
    size = policy.generator.batch_size * engine.world_size
    for first in range(0, len(requests), size):
        yield map_sharded(engine, policy.respond, requests[first : first + size])


def map_sharded(
    engine: Engine, measure: Callable[[list[Item]], Iterable[Result]], items: Sequence[Item]
) -> list[Result]:
    """Apply `measure`, which returns one result for each item, to a share of the items on each process.

    All processes receive all results, in the order of the items.
    """
    mine = range(engine.rank, len(items), engine.world_size)
    results = zip(mine, measure([items[i] for i in mine]), strict=True) if mine else ()
    return [result for _, result in sorted(engine.gather_objects(list(results)), key=itemgetter(0))]


def with_num_tokens(rows: Sequence[CompletionRow], tokenizer) -> list[CompletionRow]:
    """Return the rows with token counts under this tokenizer, stop token included."""
    encoded = encode_responses(tokenizer, [row.response for row in rows])
    return [replace(row, num_tokens=len(ids)) for row, ids in zip(rows, encoded, strict=True)]


# --- one file, several processes --------------------------------------------------------------------------


def open_file(
    engine: Engine, path: Path, meta: Mapping[str, Any]
) -> tuple[CompletionsWriter | None, set[Key]]:
    """Open the file for writing on the main process (None on the others), and return the keys of its rows on all.

    Raises DataError on every process when the file was made with other settings, or has rows but no meta file;
    ConfigError when the processes do not share its folder.
    """
    require_shared_folder(engine, path.parent, "run_dir")
    writer, keys, fault = None, set(), None
    if engine.is_main:
        try:
            if path.exists() and not meta_path(path).exists():
                raise DataError(
                    f"{path} is there without {meta_path(path).name}: a file from elsewhere; choose another run_dir"
                )
            writer = CompletionsWriter(path, meta)
            keys = set(writer.done)
        except DataError as error:
            fault = str(error)
    keys, fault = engine.from_main((keys, fault))
    if fault is not None:
        raise DataError(fault)
    return writer, keys


# --- what decides the texts -----------------------------------------------------------------------------


def weights_sha256(model: nn.Module) -> str:
    """Hash names, types, shapes and bytes of all weights, independent of how they are sharded into files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def requests_sha256(requests: Sequence[Request]) -> str:
    """Hash prompts, their token ids, references and seeds, in order."""
    digest = hashlib.sha256()
    for request in requests:
        record = request.example.record
        line = [record.prompt, list(request.example.query_ids), best_response(record), request.seed]
        digest.update(json.dumps(line).encode() + b"\n")
    return digest.hexdigest()


def sha256_of(values: Mapping[str, Any]) -> str:
    """Hash JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
