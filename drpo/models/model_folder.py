"""Inspect the model at a path or hub id, and raise errors that describe it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from drpo.config import ConfigError
from drpo.data.files import entries
from drpo.models.gguf import UNREADABLE, location, reading


def is_local(path: str) -> bool:
    """Return whether `path` is a folder or can only mean one; anything else is a hub id."""
    parent = Path(path).parent
    return (
        Path(path).exists()
        or path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or (str(parent) != "." and parent.is_dir())
    )


def check_folder(path: str, key: str, any_of: tuple[str, ...]) -> None:
    """Raise ConfigError, describing what is there instead, unless `path` is a folder with one of the files."""
    folder = Path(path)
    if not folder.is_dir():
        nearest = next(parent for parent in folder.parents if parent.is_dir())
        raise ConfigError(f"{key}: no folder {path!r}; {str(nearest)!r} holds {entries(nearest)}")
    if not any((folder / name).is_file() for name in any_of):
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = "; this is a bare adapter: merge it into its base model and save that"
        raise ConfigError(f"{key}: {path!r} has no {any_of[0]}; it holds {entries(folder)}{hint}")


def check_present(path: str, key: str) -> tuple[str, dict[str, str]]:
    """Return the `location` of a model; raise ConfigError when a local path holds none."""
    source, gguf = location(path, key)
    if is_local(path) and not gguf:
        check_folder(path, key, ("config.json",))
    return source, gguf


def read_config(path: str, key: str) -> dict[str, Any]:
    """Read the config.json of any model at a folder or hub id, or the equivalent of a GGUF file.

    Raises ConfigError when there is none, or it cannot be read.
    """
    source, gguf = check_present(path, key)
    if gguf:
        with reading(Path(source, gguf["gguf_file"]), key):
            return PreTrainedConfig.get_config_dict(source, **gguf)[0]
    try:
        return PreTrainedConfig.get_config_dict(source)[0]
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[0]
        if is_local(path):
            raise ConfigError(f"{key}: cannot read {path}/config.json: {reason}") from error
        raise ConfigError(
            f"{key}: {path!r} is no folder here, and the hub did not give it: {reason}"
        ) from error


def check_complete(info: dict[str, Any], path: str, key: str) -> None:
    """Raise ConfigError when transformers had to make up weights: `info` is its output_loading_info."""
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"{key}: {path!r} lacks {len(missing)} weights, which would be random: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}; it holds another kind of model, or only a part of this one"
        )


def is_causal_lm(model_type: str | None, architectures: list[str] | None) -> bool:
    """Return whether transformers has a causal LM of this type, and the weights (if there are any) are of one."""
    class_names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, ())
    class_names = (class_names,) if isinstance(class_names, str) else class_names
    return any(name in class_names or name.endswith("ForCausalLM") for name in architectures or class_names)


def kind_of(saved: dict[str, Any]) -> str:
    """Describe the kind of model in a config.json, for an error."""
    kind = f"a model of type {saved['model_type']}" if "model_type" in saved else "a model of no known type"
    return ", ".join(saved.get("architectures") or [kind])
