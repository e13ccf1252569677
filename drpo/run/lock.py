"""Lock a run's folder for one process at a time: two would mix their checkpoints and metrics."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

WAIT_SECONDS = 10.0  # a killed process may take a while to exit
_HELD: dict[Path, IO[str]] = {}
"The folders that this process holds, until it ends or releases them."


def hold_folder(folder: Path) -> None:
    """Create the folder and lock it for this process, on its config.yaml, until the process exits.

    Raises BlockingIOError when another process keeps the lock. On a file system without locks nothing is locked.
    """
    key = folder.resolve()
    if key in _HELD:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "config.yaml").open("a")
    if any(os.path.sameopenfile(file.fileno(), held.fileno()) for held in _HELD.values()):
        file.close()  # locked before the folder was moved
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
    """Release the lock of this process on a folder."""
    if (file := _HELD.pop(folder.resolve(), None)) is not None:
        file.close()
