"""The architecture of a model by its path, also of one that does not exist yet, and without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from transformers import CONFIG_MAPPING, PreTrainedConfig

from drpo.config import ConfigError
from drpo.models.model_folder import is_local, read_config
from launch.command_line import RECIPES

KNOWN = Path(__file__).with_suffix(".yaml")
"Configs of the models that the shipped recipes name, by hub id."


def architecture_of(path: str, key: str) -> PreTrainedConfig:
    """Return the config of the model at `path`; the backbone's, where that is a value or reward model.

    `path` is a folder, a GGUF file, a hub id, or what a shipped recipe will write (`runs/tldr/sft_1b/policy`): that has
    the architecture of the model that it starts from. Raises ConfigError, naming `key`, where none is found.
    """
    if not Path(path).exists():
        settings = _model_of_maker(path)
        if settings is not None and settings.get("architecture"):
            return fresh_architecture(settings["architecture"], settings.get("vocab_size"))
        if settings is not None:
            return architecture_of(settings["path"], key)
        if path in (known := yaml.safe_load(KNOWN.read_text())):
            return fresh_architecture(known[path], None)
    try:
        saved = read_config(path, key)
    except ConfigError as error:
        remedy = f"{key}=FOLDER or a hub id of the same architecture" if is_local(path) else f"{key}=FOLDER"
        raise ConfigError(
            f"{error}. To plan without the model, give {remedy}: its config.json is enough"
        ) from error
    saved = saved.get("backbone", saved)
    if saved.get("model_type") not in CONFIG_MAPPING:
        raise ConfigError(f"{key}: the config of {path!r} has no model_type that transformers knows")
    return CONFIG_MAPPING[saved["model_type"]].from_dict(dict(saved))


def fresh_architecture(architecture: dict[str, Any], vocab_size: int | None) -> PreTrainedConfig:
    """Return the config of a model from scratch; `vocab_size` is that of the tokenizer that is trained for it."""
    sizes = {} if vocab_size is None else {"vocab_size": vocab_size}
    fields = {**sizes, **architecture}
    return CONFIG_MAPPING[fields.pop("model_type")](**fields)


def _model_of_maker(path: str) -> dict[str, Any] | None:
    """Return the section `model` of the shipped recipe whose run writes `path`, or None."""
    folder = str(Path(path).parent)
    for recipe in sorted(RECIPES.rglob("*.yaml")):
        settings = yaml.safe_load(recipe.read_text())
        if settings.get("run_dir") == folder and "model" in settings:
            return settings["model"]
    return None
