"""Runs to be killed: started in a process group of their own, watched until a step."""

from __future__ import annotations

import time
from pathlib import Path

from tiny_runs import started
from warm_python import WarmProcess


def start(command: list[str], *arguments: str, cwd: Path) -> WarmProcess:
    """In a process group of its own; a launcher's workers end with it."""
    with (cwd / "log.txt").open("a") as log:
        return started(command, *arguments, cwd=cwd, out=log, err=log)


def wait_for_step(process: WarmProcess, run_dir: Path, step: int) -> None:
    """Until `step` is in the metrics (its checkpoint may be under way)."""
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, (run_dir.parent / "log.txt").read_text()[-3000:]
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} never came")
