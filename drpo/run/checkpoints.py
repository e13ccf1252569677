"""Atomic checkpoints and exact resume.

`checkpoints/step_<n>/` appears by one rename after all of it has been synced to disk, so a kill at any moment
leaves the last one complete. It holds the engine's state (weights, optimizer, random state of every rank)
and `trainer.json`: the step, the recipe, and the state of the trainer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from drpo.engine import Engine

STEP_FOLDER = re.compile(r"step_(\d+)$")


class CheckpointError(RuntimeError):
    """Error for an unusable checkpoint; the message names it, the reason and the remedy."""


def save_checkpoint(engine: Engine, run_dir: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `checkpoints/step_<step>` atomically from all ranks, then delete all but the newest `keep`.

    Args:
        engine: gives its state: weights, optimizer, random numbers.
        run_dir: folder of the run.
        step: the step just taken.
        state: JSON values of the trainer.
        keep: number of checkpoints that stay.
    """
    folder = run_dir / "checkpoints" / f"step_{step}"
    partial = folder.with_name(f".partial_{step}")
    if engine.is_main:
        for remnant in folder.parent.glob(".*_*"):  # of a process that was killed
            shutil.rmtree(remnant)
        partial.mkdir(parents=True)
    engine.barrier()
    engine.save_state(partial)
    engine.barrier()
    if engine.is_main:
        (partial / "trainer.json").write_text(json.dumps({"step": step, **state}))
        _flush_to_disk(partial)
        _remove(folder)
        os.replace(partial, folder)
        _flush_folder(folder.parent)
        for old in list_checkpoints(run_dir)[:-keep]:
            _remove(old)
    engine.barrier()
    return folder


def _remove(folder: Path) -> None:
    """Delete a checkpoint after renaming it, so that a partial deletion never looks complete."""
    if folder.exists():
        hidden = folder.with_name(f".removed_{folder.name}")
        os.replace(folder, hidden)
        shutil.rmtree(hidden)


def load_checkpoint(engine: Engine, folder: Path) -> dict[str, Any]:
    """Restore the engine's state and return the trainer's."""
    state = read_trainer_state(folder)
    saved_world_size = state["world_size"]
    if saved_world_size != engine.world_size:
        raise CheckpointError(
            f"{folder} was written by {saved_world_size} processes and this run has {engine.world_size}; "
            f"exact resume needs the same number: launch with --num_processes {saved_world_size}"
        )
    try:
        engine.load_state(folder)
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        raise CheckpointError(
            f"{folder} holds other weights than the models of this run, as checkpoints of LoRA runs from before policy "
            "and critic shared their base do: finish the run with the version that began it, or begin anew with "
            f"resume=restart ({str(error)[:300]})"
        ) from error
    return state


def read_trainer_state(folder: Path) -> dict[str, Any]:
    path = Path(folder) / "trainer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no trainer.json")
    return json.loads(path.read_text())


def list_checkpoints(run_dir: Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first."""
    root = Path(run_dir) / "checkpoints"
    folders = [p for p in root.glob("step_*") if STEP_FOLDER.match(p.name) and (p / "trainer.json").is_file()]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(STEP_FOLDER.match(checkpoint.name)[1])


def _flush_to_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            _flush_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
