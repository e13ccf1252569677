"""What experiments over seeds share: runs that are made once, and the interval of their results."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

LAUNCH = Path(__file__).resolve().parent


def launch_once(stage: str, recipe: str, run_dir: Path, overrides: Sequence[str], num_jobs: int) -> None:
    """Run launch/<stage>.py on its share of the cores, unless this very command has finished in `run_dir`.

    Raises RuntimeError, naming the log, when the run fails.
    """
    command = [sys.executable, str(LAUNCH / f"{stage}.py"), recipe, f"run_dir={run_dir}", *overrides]
    command += ["engine.trackers=[]", "log.samples_every=0"]
    done_command = run_dir / "command.txt"  # the run that this folder's policy is the result of
    if done_command.exists() and done_command.read_text() == " ".join(command[1:]):
        return
    threads = str(max(1, (os.cpu_count() or 1) // num_jobs))
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "log.txt").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": threads})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with code {done.returncode}; see {run_dir}/log.txt")
    done_command.write_text(" ".join(command[1:]))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95% t-interval over seeds."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(np.mean(values)), float(half)
