"""Runs to be killed: started in a process group of their own, watched until a step."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tiny_runs import (
    CLEAN,
)


def start(command: list[str], *arguments: str, cwd: Path) -> subprocess.Popen:
    """In a process group of its own, so that a kill reaches the launcher's children too."""
    log = (cwd / "log.txt").open("a")
    return subprocess.Popen(
        [*command, *arguments], cwd=cwd, env=CLEAN, stdout=log, stderr=log, start_new_session=True
    )


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    """Until `step` is in the metrics (its checkpoint may be under way)."""
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, (run_dir.parent / "log.txt").read_text()[-3000:]
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} never came")
