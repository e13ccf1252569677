"""Run a launch script in a process of its own, for its speed: the inputs, the recipe, and the metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from drpo.run.metrics import read_metrics
from launch.command_line import call


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write a JSONL file, and its folder if that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure_run(
    script: Path,
    settings: Mapping[str, Any],
    folder: Path,
    num_threads: int,
    launcher: Sequence[str] = (),
) -> list[dict[str, float]]:
    """Run a script anew, without evaluation and checkpoints, in `folder`; return its metrics, step by step.

    Its recipe and log are next to the folder. Raises StageFailed, naming the log, when it fails.

    Args:
        script: the launch script.
        settings: its recipe, but for the folder.
        folder: the run's.
        num_threads: OMP_NUM_THREADS of the process.
        launcher: arguments of Python before the script.
    """
    recipe = {"run_dir": str(folder), "resume": "restart", "eval": {"every": 0}, "checkpoint": {"every": 0}}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe | dict(settings)))
    call(num_threads, [*launcher, str(script), str(path)], folder.with_suffix(".log"), folder.parent)
    return read_metrics(folder / "metrics.jsonl")
