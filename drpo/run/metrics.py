"""Named scalars of a run: one JSON object per step in `metrics.jsonl`, and the same in accelerate's trackers.

Keys are `group/name`. Wall-clock numbers are under `time/`, throughput and memory under `perf/`; every other
key is deterministic: a run that was killed and resumed writes the same values as an uninterrupted one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from drpo.data.records import DataError
from drpo.jsonl import object_in, read_objects

WALL_CLOCK_GROUPS = ("time/", "perf/")


class JsonLines:
    """A JSONL file of one run, appended to line by line and cut back to a step on resume."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def write(self, *rows: Mapping[str, object]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=True) + "\n")

    def keep_up_to(self, step: int) -> None:
        """Drop the rows of later steps, and a partial last line left by a kill."""
        if not self.path.exists():
            return
        lines = self.path.read_bytes().split(b"\n")[:-1]  # in bytes: a kill may cut a character in two
        numbered = enumerate(lines, start=1)
        kept_lines = [line + b"\n" for number, line in numbered if self._step(line, number) <= step]
        replacement = self.path.with_suffix(".tmp")
        replacement.write_bytes(b"".join(kept_lines))
        replacement.replace(self.path)

    def _step(self, line: bytes, number: int) -> int:
        place = f"{self.path}:{number}"
        step = object_in(line, place).get("step")
        if not isinstance(step, int):
            raise DataError(f"{place} has no step; remove that line to resume")
        return step


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the rows of a `metrics.jsonl`; raise DataError, naming file and line, for a damaged one."""
    return read_objects(path)


def reproducible(row: Mapping[str, float]) -> dict[str, float]:
    """Return a metrics row without its wall-clock keys."""
    return {key: value for key, value in row.items() if not key.startswith(WALL_CLOCK_GROUPS)}


class Phases:
    """Seconds spent in the named phases of one step."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # else a phase's last kernels would count for the next one
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Return `time/<phase>` of every phase and `time/step` of the whole."""
        total = time.perf_counter() - self._start
        return {f"time/{name}": value for name, value in self._seconds.items()} | {"time/step": total}


def peak_memory_gib(device: torch.device) -> float:
    """Return this process's peak memory since the last call: the device's on GPUs, resident memory on CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    peak = float("nan")
    with open(f"/proc/{os.getpid()}/status") as status:
        for line in status:
            if line.startswith("VmHWM"):
                peak = int(line.split()[1]) / 2**20
    with suppress(OSError), open(f"/proc/{os.getpid()}/clear_refs", "w") as reset:
        reset.write("5")  # the kernel measures the peak anew; without the permission, since the start
    return peak
