"""Check that all processes see the same folder and have the same settings.

On several machines nothing else ensures this: processes that resume from different disks, or train by different
recipes, would run on together and end with weights of neither. Every check is collective: all processes must call it,
and it raises on all of them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from drpo.config import ConfigError
from drpo.engine import Engine

WAIT_SECONDS = 5.0  # a network file system may show a new file late


def require_shared_folder(engine: Engine, folder: Path, key: str) -> None:
    """Raise ConfigError naming `key` unless every process sees the main one's files in `folder`.

    Files that the check creates, and the folder if it is new, are removed again.
    """
    if engine.world_size == 1:
        return
    new_folders: list[Path] = []
    name, problem = f".shared_{uuid.uuid4().hex}", ""
    if engine.is_main:
        try:
            new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        except OSError as error:
            problem = str(error)
    name, problem = engine.from_main((name, problem))
    if problem:
        raise ConfigError(f"{key}: {folder} cannot be written to: {problem}")
    sees_file = engine.gather_objects([engine.is_main or _appears(folder / name)])
    if engine.is_main:
        (folder / name).unlink()
        with suppress(OSError):  # another run may use them meanwhile
            for path in new_folders:
                path.rmdir()
    engine.barrier()
    if blind_ranks := [str(rank) for rank, sees in enumerate(sees_file) if not sees]:
        shown = ", ".join(blind_ranks[:8]) + ", ..." * (len(blind_ranks) > 8)
        raise ConfigError(
            f"{key}: process {shown} of {engine.world_size} cannot see what process 0 writes to its "
            f"{folder.absolute()}; all processes, on all machines, need the same folder: start them with the same "
            f"{key} on a file system that the machines share"
        )


def require_same(engine: Engine, values: Mapping[str, Any], what: str) -> None:
    """Raise ConfigError, naming the keys that differ, unless all processes have equal `values`.

    `what` describes the values in the message.
    """
    if engine.world_size == 1:
        return
    expected, *other_values = engine.gather_objects([dict(values)])
    for rank, values in enumerate(other_values, start=1):
        differing = [key for key in sorted(expected | values) if expected.get(key) != values.get(key)]
        if differing:
            shown = "; ".join(f"{key}: {expected.get(key)!r} and {values.get(key)!r}" for key in differing)
            raise ConfigError(
                f"processes 0 and {rank} have different {what}: {shown}. Start all processes, on all machines, with "
                "the same recipe, overrides and files"
            )


def _appears(path: Path) -> bool:
    """Return whether a file exists, or appears within WAIT_SECONDS."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
        if path.parent.is_dir():
            list(path.parent.iterdir())  # listing the folder makes NFS query its server again
    return True
