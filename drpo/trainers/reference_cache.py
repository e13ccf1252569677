"""Log-probabilities of the reference, per token, computed once and kept on disk: no reference model in training.

The folder holds `key.json`, which says what they were made with, and `logprobs.npy`, float32: the tokens of the
chosen and then of the rejected response of every pair, pair after pair. It appears by one rename when it is whole.
"""

from __future__ import annotations

import functools
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
from drpo.models.saved import is_local, read_config
from drpo.run_folder import RunFolder
from drpo.trainers.all_logprobs import all_logprobs
from drpo.trainers.pair_objective import block_logprobs
from drpo.trainers.pair_stages import PairStages
from drpo.trainers.pairs import Pair
from drpo.trainers.preference_recipe import PreferenceRecipe
from drpo.trainers.reference import Reference


def is_cached(recipe: PreferenceRecipe) -> bool:
    """Whether reference.cache_dir holds log-probs, be they the right ones or not."""
    cache_dir = recipe.reference.cache_dir
    return cache_dir is not None and (Path(cache_dir) / "key.json").exists()


def with_cached_reference(
    recipe: PreferenceRecipe,
    engine: Engine,
    run: RunFolder,
    data: PairStages,
    tokenizer,
    reference: Reference | None,
) -> PairStages:
    """The pairs with their reference log-probs, read from `reference.cache_dir`, or computed into it first.

    `reference` may be None when the folder is there. Raises ConfigError, naming what differs, when it was made with
    another reference, data or precision.
    """
    folder = Path(recipe.reference.cache_dir)
    pairs = [pair for part in (*data.stages, data.held_out) for pair in part]
    key = _key(recipe, engine.precision, pairs)
    if is_cached(recipe):
        _refuse_other_key(folder, key)
        run.say(f"reference log-probs: read from {folder}")
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"reference.cache_dir: {folder} holds something else than reference log-probs")
    else:
        score = functools.partial(block_logprobs, share_prompts=recipe.share_prompts)
        computed = all_logprobs(
            [(pair.example.query_ids, pair.response_ids) for pair in pairs],
            engine,
            run,
            functools.partial(reference.apply, score),
            recipe.batch.microbatch_size,
            tokenizer.pad_token_id,
        )
        if engine.is_main:
            _write(folder, key, np.concatenate([row for rows in computed for row in rows]))
        engine.barrier()
    rows = iter(_read(folder, [len(ids) for pair in pairs for ids in pair.response_ids]))
    stages = [
        [replace(pair, reference_logprobs=(next(rows), next(rows))) for pair in part]
        for part in (*data.stages, data.held_out)
    ]
    return PairStages(stages[:-1], stages[-1], data.report)


def _key(recipe: PreferenceRecipe, precision: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Everything that decides the log-probs: the reference's weights, its arithmetic, and the token ids."""
    model, path = recipe.model, recipe.reference.path or recipe.model.path
    tokens = hashlib.sha256()
    for pair in pairs:
        tokens.update(json.dumps([pair.example.query_ids, *pair.response_ids]).encode())
    return {
        "reference": _weights_digest(path)
        if path
        else f"seed {recipe.seed}, {json.dumps(model.architecture)}",
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        "mixed_precision": precision,
        "num_pairs": len(pairs),
        "token_ids": tokens.hexdigest(),
    }


def _weights_digest(path: str) -> str:
    """Hash of the weight files and the config of a folder; the commit of a hub id."""
    if not is_local(path):
        return f"{path}@{read_config(path, 'reference.path').get('_commit_hash')}"
    digest = hashlib.sha256()
    for file in sorted(Path(path).iterdir()):
        if file.suffix in (".safetensors", ".bin") or file.name == "config.json":
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()


def _refuse_other_key(folder: Path, now: dict[str, Any]) -> None:
    then = json.loads((folder / "key.json").read_text())
    changed = [
        f"{name}: {then.get(name)} -> {value}" for name, value in now.items() if then.get(name) != value
    ]
    if changed:
        raise ConfigError(
            f"reference.cache_dir: {folder} holds log-probs made otherwise ({'; '.join(changed)}); name another "
            "folder, or delete this one to compute them anew"
        )


def _read(folder: Path, lengths: Sequence[int]) -> list[np.ndarray]:
    """The log-probs of each response, from disk when they are used."""
    try:
        flat = np.load(folder / "logprobs.npy", mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"reference.cache_dir: {folder}/logprobs.npy cannot be read ({error}); delete {folder}"
        ) from None
    if flat.shape != (sum(lengths),):
        raise ConfigError(
            f"reference.cache_dir: {folder}/logprobs.npy has not one number a token; delete {folder}"
        )
    return np.split(flat, np.cumsum(lengths)[:-1])


def _write(folder: Path, key: dict[str, Any], flat: np.ndarray) -> None:
    partial = folder.with_name(f".partial_{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    np.save(partial / "logprobs.npy", flat)
    (partial / "key.json").write_text(json.dumps(key, indent=1))
    if folder.exists():
        folder.rmdir()  # empty
    os.replace(partial, folder)
