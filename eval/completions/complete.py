"""Collect the responses of a policy, or of a file made elsewhere, as one JSONL file for judges and tables."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.config import ConfigError, save_resolved
from drpo.data.load import load_examples
from drpo.data.stop import template_of, with_stop_token
from drpo.data.views import best_response
from drpo.engine import Engine, EngineConfig
from drpo.models.loading import ModelConfig, load_policy
from drpo.models.positions import check_sampling
from drpo.models.tokenizer import load_tokenizer
from drpo.rollout.generator import Generator
from drpo.run.folder import flatten
from drpo.run.stopped import RunStopped
from drpo.versions import package_versions
from eval.completions.fixed_systems import constant_rows, reference_rows
from eval.completions.imported import file_sha256, import_rows
from eval.completions.recipe import CompleteRecipe
from eval.completions.response_scores import response_nlls
from eval.completions.rows import (
    NULL,
    NULL_RESPONSE,
    REFERENCE,
    CompletionRow,
    CompletionsWriter,
    read_completions,
)
from eval.completions.sample import (
    Policy,
    Request,
    make_requests,
    map_sharded,
    open_file,
    requests_sha256,
    sample_responses,
    sha256_of,
    vocabulary_with,
    weights_sha256,
    with_num_tokens,
)
from eval.completions.text_metrics import TextMetrics, measure
from eval.completions.text_metrics_table import save_text_metrics, text_metrics_table
from eval.progress import Progress, Say

# These do not affect the texts, so they may differ between a run and its resumption.
FREE_ON_RESUME = ("run_dir", "batch_size", "reference", "null_response", "perplexity_policy")
TABLE_WIDTH = 120


def complete(recipe: CompleteRecipe, say: Say = print) -> Path:
    """Sample the missing responses of the policy, add the built-in systems and measure the texts.

    Writes completions.jsonl, completions.meta.json (the settings that decide the texts), text_metrics.json and
    config.yaml to `run_dir`, and returns the path of the first. A second call resumes an interrupted one. Raises
    ConfigError or DataError for inputs that cannot be read, RunStopped on Ctrl-C.
    """
    importing = recipe.imported.path is not None
    if importing and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("a file is imported in one process: start complete.py with python")
    if not importing and (recipe.policy is None or recipe.system is None):
        raise ConfigError("policy must name a policy (folder or hub id), and system what tables call it")
    folder = Path(recipe.run_dir)
    config = EngineConfig(mixed_precision=recipe.mixed_precision, trackers=[])
    engine = Engine(config, folder, recipe.seed, max_grad_norm=None)
    recipe = replace(recipe, mixed_precision=engine.precision)  # null resolved for this machine
    path = _import(recipe, engine, say) if importing else complete_policy(recipe, engine, say)
    rows = read_completions(path)
    nlls = _nlls(recipe, engine, rows, say)
    if engine.is_main:
        measured = _metrics(rows, nlls)
        save_text_metrics(measured, folder / "text_metrics.json")
        Console(width=TABLE_WIDTH).print(text_metrics_table(measured))
    engine.close()
    return path


def requests_of(recipe: CompleteRecipe, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Request], str]:
    """Return the requests to a policy with this tokenizer, and the report on the data."""
    splits = load_examples(recipe.data, tokenizer, "prompts", held_out_only=recipe.split == "eval")
    examples = splits.train if recipe.split == "train" else splits.eval
    if not examples:
        raise ConfigError(f"split={recipe.split} has no prompts; see data.eval_split and data.eval_fraction")
    seeds = range(recipe.seed, recipe.seed + recipe.num_responses)
    return make_requests(examples, recipe.num_prompts, seeds), splits.report


def check_references(requests: Sequence[Request], setting: str) -> None:
    """Raise ConfigError if `setting` needs the dataset's responses and prompts lack one."""
    prompts = {request.prompt_id: best_response(request.example.record) for request in requests}
    num_without = sum(response is None for response in prompts.values())
    if num_without:
        raise ConfigError(
            f"{setting} needs the dataset's own responses, and {num_without} of {len(prompts)} prompts have none: the "
            "data needs a column completion, chosen, or responses with scores"
        )


def complete_policy(recipe: CompleteRecipe, engine: Engine, say: Say) -> Path:
    """Sample the responses that are missing from the file; all processes must call it."""
    path = Path(recipe.run_dir) / "completions.jsonl"
    tokenizer = with_stop_token(load_tokenizer(recipe.policy), recipe.data)
    requests, report = requests_of(recipe, tokenizer)
    if recipe.reference:
        check_references(requests, "reference=true")
    model = load_to_read(recipe, recipe.policy, tokenizer)
    examples = [request.example for request in requests]
    notes = check_sampling(model, examples, recipe.max_response_length, "policy", "max_response_length")
    writer, done = open_file(engine, path, _meta(recipe, engine, model, requests))
    missing = [request for request in requests if request.key(recipe.system) not in done]
    num_done = len(requests) - len(missing)
    vocabulary = vocabulary_with(recipe.bad_tokens, tokenizer, model)
    model = engine.place(model, as_trained=False)
    sampling, length = recipe.sampling, recipe.max_response_length
    generator = Generator(model, tokenizer, vocabulary, sampling, length, recipe.batch_size)
    policy = Policy(recipe.system, generator)
    progress = Progress(len(requests), num_done, "responses", say)
    if engine.is_main:
        save_resolved(recipe, path.with_name("config.yaml"))
        say("\n".join([*notes, report, f"{path}: {num_done} of {len(requests)} responses are there"]))
    try:
        with engine.frozen_autocast():
            for rows in sample_responses(engine, policy, missing):
                if writer is not None:
                    writer.write(rows)
                    progress.advance(len(rows))
    except KeyboardInterrupt:
        raise RunStopped(f"stopped; {path} is kept, and the same command goes on from there") from None
    _add_systems(recipe, writer, path, tokenizer)
    engine.barrier()
    return path


def load_to_read(recipe: CompleteRecipe, path: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load a policy for inference in the recipe's precision. Raises ConfigError for a damaged one."""
    config = ModelConfig(path=path, dtype=recipe.dtype, attn_implementation=recipe.attn_implementation)
    try:
        return load_policy(config, tokenizer).eval()
    except ConfigError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"the policy {path!r} cannot be loaded: {error}") from error


def _meta(
    recipe: CompleteRecipe, engine: Engine, model: PreTrainedModel, requests: Sequence[Request]
) -> dict[str, Any]:
    """Collect all settings that decide the texts; a file is resumed only if all of them are equal."""
    versions = {"python": sys.version.split()[0], **package_versions()}
    versions |= {name: metadata.version(name) for name in ("drpo", "tokenizers", "numpy")}
    unbound = (*FREE_ON_RESUME, "imported")
    settings = {key: value for key, value in flatten(recipe).items() if key.partition(".")[0] not in unbound}
    return {
        "weights_sha256": weights_sha256(model) if engine.is_main else None,
        "data_sha256": requests_sha256(requests),
        "settings_sha256": sha256_of(settings),
        "precision": engine.precision,
        "device": engine.device.type,
        **{f"version.{name}": version for name, version in versions.items()},
        **{f"settings.{key}": value for key, value in settings.items()},
    }


def _add_systems(
    recipe: CompleteRecipe,
    writer: CompletionsWriter | None,
    path: Path,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Write the rows of "reference" and "null" that are asked for and missing."""
    if writer is None or not (recipe.reference or recipe.null_response):
        return
    rows = [row for row in read_completions(path) if row.system not in (REFERENCE, NULL)]
    added = reference_rows(rows) if recipe.reference else []
    added += constant_rows(rows, NULL, NULL_RESPONSE) if recipe.null_response else []
    added = [row for row in added if row.key not in writer.done]
    writer.write(added if tokenizer is None else with_num_tokens(added, tokenizer))


def _import(recipe: CompleteRecipe, engine: Engine, say: Say) -> Path:
    path = Path(recipe.run_dir) / "completions.jsonl"
    rows = import_rows(recipe.imported, recipe.system)
    meta = {"imported.sha256": file_sha256(recipe.imported.path), "system": recipe.system}
    meta |= {f"imported.{name}": value for name, value in asdict(recipe.imported).items()}
    if recipe.reference:
        reference_rows(rows)  # raises if there are none, before a file is bound to these rows
    writer, done = open_file(engine, path, meta)
    save_resolved(recipe, path.with_name("config.yaml"))
    writer.write([row for row in rows if row.key not in done])
    _add_systems(recipe, writer, path, None)
    say(f"{path}: {len(rows)} responses from {recipe.imported.path}")
    return path


# --- metrics --------------------------------------------------------------------------------------------


def _nlls(
    recipe: CompleteRecipe, engine: Engine, rows: Sequence[CompletionRow], say: Say
) -> tuple[np.ndarray, np.ndarray] | None:
    """Compute negative log-likelihoods under the reference policy and token counts, sharded over the processes."""
    if recipe.perplexity_policy is None:
        return None
    tokenizer = with_stop_token(load_tokenizer(recipe.perplexity_policy), recipe.data)
    policy = engine.place(load_to_read(recipe, recipe.perplexity_policy, tokenizer), as_trained=False)
    chat = template_of(recipe.data, tokenizer)

    def nlls_and_counts(share: list[CompletionRow]) -> Iterable[tuple[float, int]]:
        return zip(*response_nlls(policy, tokenizer, share, recipe.batch_size, chat, say), strict=True)

    with torch.no_grad(), engine.frozen_autocast():
        nlls, counts = zip(*map_sharded(engine, nlls_and_counts, rows), strict=True)
    return np.array(nlls), np.array(counts)


def _metrics(rows: Sequence[CompletionRow], nlls: tuple[np.ndarray, np.ndarray] | None) -> list[TextMetrics]:
    """Compute the metrics of each system, in file order."""
    measured = []
    for system in dict.fromkeys(row.system for row in rows):
        indices = [i for i, row in enumerate(rows) if row.system == system]
        system_nlls = None if nlls is None else (nlls[0][indices], nlls[1][indices])
        measured.append(measure([rows[i] for i in indices], system_nlls))
    return measured
