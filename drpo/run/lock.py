"""One process at a time trains in a folder: two would write their checkpoints and metrics into each other's."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

WAIT_SECONDS = 10.0  # a process that was killed may take a while to be gone
_HELD: dict[Path, IO[str]] = {}
"The folders that this process holds, until it ends or releases them."


def hold_folder(folder: Path) -> None:
    """Make the folder and hold it for this process, by a lock on its config.yaml that ends with the process.

    Raises BlockingIOError when another process holds it and goes on to. A file system without locks is taken without.
    """
    key = folder.resolve()
    if key in _HELD:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "config.yaml").open("a")
    if any(os.path.sameopenfile(file.fileno(), held.fileno()) for held in _HELD.values()):
        file.close()  # held where the folder was before it was moved
        return
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise
            time.sleep(0.1)
            continue
        except OSError:
            pass
        break
    _HELD[key] = file


def release_folder(folder: Path) -> None:
    """Let other processes have a folder that this one held."""
    if (file := _HELD.pop(folder.resolve(), None)) is not None:
        file.close()
