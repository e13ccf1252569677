"""Writing a file so that whoever looks finds it whole: as it was before, or as it is now."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Put `text` (UTF-8) in place of what the file holds. A run that is killed, or a full disk, leaves the old one."""
    replacement = path.with_name(path.name + ".tmp")
    try:
        with replacement.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        replacement.replace(path)
    finally:
        replacement.unlink(missing_ok=True)
