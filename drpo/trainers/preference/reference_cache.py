"""Cache of the reference's log-probabilities per token, computed once: no reference model in training.

The folder contains `logprobs.npy`, float32: the tokens of the chosen and then of the rejected response of every pair,
pair after pair; and `key.json`, with the settings that determine them, and their hash. The folder is written
atomically, by a rename; of several runs that write it at once the first one wins.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from drpo.config import ConfigError
from drpo.engine import Engine
from drpo.models.gguf import gguf_file
from drpo.models.model_folder import is_local, read_config
from drpo.run.folder import RunFolder
from drpo.run.same_view import require_same, require_shared_folder
from drpo.trainers.preference.dataset_logprobs import reference_logprobs
from drpo.trainers.preference.pairs import Pair
from drpo.trainers.preference.recipe import PreferenceRecipe
from drpo.trainers.preference.stages import PairStages
from drpo.trainers.reference import Reference


def is_cached(recipe: PreferenceRecipe, engine: Engine) -> bool:
    """Return whether the main process sees log-probs, valid or not, in reference.cache_dir.

    Raises ConfigError when the processes do not share the folder.
    """
    if recipe.reference.cache_dir is None:
        return False
    folder = Path(recipe.reference.cache_dir)
    # Another run may be about to rename its cache to this path, so the check uses the parent folder.
    require_shared_folder(engine, folder.absolute().parent, "reference.cache_dir")
    return engine.from_main((folder / "key.json").exists())


def with_cached_reference(
    run: RunFolder, data: PairStages, tokenizer, reference: Reference | None
) -> PairStages:
    """Return the pairs with reference log-probs, read from `reference.cache_dir`, or computed and saved there first.

    `reference` may be None on a cache hit. Raises ConfigError, naming the differences, when the cache was made with
    another reference, data or precision.
    """
    recipe, engine = run.recipe, run.engine
    folder = Path(recipe.reference.cache_dir)
    pairs = [pair for part in (*data.stages, data.held_out) for pair in part]
    key = _key(recipe, "bf16, weights too" if engine.casts_weights else engine.precision, pairs)
    require_same(engine, key, "reference or pairs")
    if is_cached(recipe, engine):
        run.say(f"reference log-probs: read from {folder}")
    elif engine.from_main(folder.exists() and any(folder.iterdir())):
        raise ConfigError(f"reference.cache_dir: {folder} holds something else than reference log-probs")
    else:
        prompts = [(pair.example.query_ids, pair.response_ids) for pair in pairs]
        computed = reference_logprobs(run, prompts, tokenizer, reference)
        if engine.is_main:
            _write(folder, key, np.concatenate([logprobs for pair in computed for logprobs in pair]))
        engine.barrier()
    logprobs = iter(_read(folder, key, [len(ids) for pair in pairs for ids in pair.response_ids]))
    *stages, held_out = (
        [replace(pair, reference_logprobs=(next(logprobs), next(logprobs))) for pair in part]
        for part in (*data.stages, data.held_out)
    )
    return PairStages(stages, held_out, data.report)


def _key(recipe: PreferenceRecipe, precision: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return the key of the cache: the reference's weights, its precision, and the token ids."""
    model, path = recipe.model, recipe.reference.path or recipe.model.path
    weights = _weights_digest(path) if path else f"seed {recipe.seed}, {json.dumps(model.architecture)}"
    in_4bit = model.load_in_4bit and recipe.reference_is_adapter_off
    tokens = hashlib.sha256()
    for pair in pairs:
        tokens.update(json.dumps([pair.example.query_ids, *pair.response_ids]).encode())
    return {
        "reference": weights,
        "dtype": f"{model.dtype}, linear layers in 4 bits" if in_4bit else model.dtype,
        "attn_implementation": model.attn_implementation,
        "mixed_precision": precision,
        "num_pairs": len(pairs),
        "token_ids": tokens.hexdigest(),
    }


def _weights_digest(path: str) -> str:
    """Hash the weight files and the config of a folder, or a GGUF file; return the commit of a hub id."""
    if gguf := gguf_file(path, "reference.path"):
        files = [gguf]
    elif is_local(path):
        files = sorted(Path(path).iterdir())
    else:
        return f"{path}@{read_config(path, 'reference.path').get('_commit_hash')}"
    digest = hashlib.sha256()
    for file in files:
        if file.suffix in (".safetensors", ".bin") or file.name == "config.json" or file == gguf:
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()


def _read(folder: Path, key: dict[str, Any], lengths: Sequence[int]) -> list[np.ndarray]:
    """Memory-map the log-probs of each response.

    Raises ConfigError when the key differs, or the file is damaged.
    """
    damaged = f"reference.cache_dir: {folder} is damaged, delete it to compute the log-probs anew"
    try:
        saved_key = dict(json.loads((folder / "key.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{damaged} (key.json: {error})") from None
    changed = [
        f"{name}: {saved_key.get(name)} -> {value}"
        for name, value in key.items()
        if saved_key.get(name) != value
    ]
    if changed:
        raise ConfigError(
            f"reference.cache_dir: {folder} holds log-probs made otherwise ({'; '.join(changed)}); name another "
            "folder, or delete this one to compute them anew"
        )
    try:
        flat = np.load(folder / "logprobs.npy", mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{damaged} (logprobs.npy: {error})") from None
    if saved_key.get("sha256") != _digest(flat):
        raise ConfigError(f"{damaged} (logprobs.npy is not what was written)")
    return np.split(flat, np.cumsum(lengths)[:-1])


def _write(folder: Path, key: dict[str, Any], flat: np.ndarray) -> None:
    partial = folder.with_name(f".partial_{folder.name}_{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    np.save(partial / "logprobs.npy", flat)
    (partial / "key.json").write_text(json.dumps({**key, "sha256": _digest(flat)}, indent=1))
    try:
        os.replace(partial, folder)
    except OSError:
        shutil.rmtree(partial)
        if not (folder / "key.json").exists():
            raise
        # Another run was faster; its cache is checked like any other.


def _digest(flat: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(flat).data).hexdigest()
