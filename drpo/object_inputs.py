"""Write the inputs of a run that are objects to a folder next to it, and name them in the recipe."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from drpo.config import ConfigError
from drpo.data.load import DataConfig
from drpo.data.records import DataError
from drpo.data.tasks.registry import TASKS
from drpo.engine import Engine
from drpo.models.loading import ModelConfig

Recipe = TypeVar("Recipe")


def with_inputs(recipe: Recipe, engine: Engine, model: Any, tokenizer: Any, records: Any) -> Recipe:
    """Return the recipe with the paths of `model`, `tokenizer` and `records`.

    Paths stay as they are; the main process writes objects to files in `<run_dir>_inputs`. Raises ConfigError for a
    model without a tokenizer, for inputs that the recipe names already, and when the folder holds other inputs of an
    earlier run; DataError, naming the row, for a row that is not a mapping or cannot be written as JSON.

    Args:
        recipe: a training recipe.
        engine: coordinates the processes.
        model, tokenizer: objects or paths; None keeps those of the recipe.
        records: rows, or the path of a file; None keeps the data of the recipe.
    """
    folder = Path(recipe.run_dir)
    folder = folder.with_name(f"{folder.name}_inputs")
    if model is not None:
        recipe = replace(recipe, model=_with_model(recipe.model, engine, model, tokenizer, folder / "model"))
    elif tokenizer is not None:
        if recipe.model.tokenizer is not None:
            raise ConfigError("tokenizer is given, and model.tokenizer too: leave one out")
        _write(engine, folder / "tokenizer", tokenizer.save_pretrained)
        recipe = replace(recipe, model=replace(recipe.model, tokenizer=str(folder / "tokenizer")))
    if records is not None:
        recipe = replace(recipe, data=_with_records(recipe.data, engine, records, folder / "records"))
    return recipe


def _with_model(config: ModelConfig, engine: Engine, model: Any, tokenizer: Any, folder: Path) -> ModelConfig:
    if config.path is not None or config.architecture:
        raise ConfigError(
            "model is given, and the recipe's model.path or model.architecture too: leave one out"
        )
    if isinstance(model, str | Path):
        if tokenizer is not None:
            raise ConfigError("tokenizer belongs to a model that is an object; a path brings its own")
        return replace(config, path=str(model))
    if tokenizer is None:
        raise ConfigError("a model that is an object needs its tokenizer: give tokenizer=")

    def save(target: Path) -> None:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    _write(engine, folder, save)
    return replace(config, path=str(folder))


def _with_records(config: DataConfig, engine: Engine, records: Any, folder: Path) -> DataConfig:
    if config.path is not None:
        raise ConfigError(f"records are given, and data.path={config.path} too: leave one out")
    task = {} if TASKS[config.task].read is not None else {"task": "own"}
    if isinstance(records, str | Path):
        return replace(config, path=str(records), **task)
    _write(engine, folder, lambda target: _save_rows(records, target))
    return replace(config, path=str(folder / "train.jsonl"), **task)


def _save_rows(records: Iterable[Mapping[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for number, row in enumerate(records):
            if not isinstance(row, Mapping):
                raise DataError(
                    f"records[{number}] is {type(row).__name__}, not a mapping of column to value"
                )
            try:
                file.write(json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n")
            except (TypeError, ValueError) as error:
                raise DataError(f"records[{number}] cannot be written as JSON: {error}") from None


def _write(engine: Engine, folder: Path, save: Any) -> None:
    """Write `folder` on the main process; it may already hold the same files."""
    problem: Exception | None = None
    if engine.is_main:
        fresh = folder.with_name(f".{folder.name}.writing")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.parent.mkdir(parents=True, exist_ok=True)
        try:
            save(fresh)
            if not folder.exists():
                fresh.rename(folder)
            elif not _same(fresh, folder):
                problem = ConfigError(
                    f"{folder} holds other inputs, of an earlier run: choose another run_dir, or remove that folder"
                )
        except (ConfigError, DataError, OSError) as error:  # the other processes wait for the outcome
            problem = error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    if (problem := engine.from_main(problem)) is not None:
        raise problem


def _same(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        return False
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names
