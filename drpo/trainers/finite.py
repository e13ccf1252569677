"""The guard against inf and nan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from drpo.engine import Engine
from drpo.run.checkpoints import list_checkpoints


def finite_or_stop(
    engine: Engine,
    run_dir: Path,
    step: int,
    values: torch.Tensor,
    what: str,
    origins: Sequence[str] = (),
) -> None:
    """Stop the run on all ranks when `values` (rows first) holds inf or nan on any of them.

    Raises FloatingPointError.

    Args:
        engine: gathers the check over the processes.
        run_dir: folder whose checkpoints the message names.
        step: current step.
        values: tensor to check.
        what: its name in the message.
        origins: names of the rows in the message (file and line of the prompt).
    """
    rows = values.detach().reshape(len(values), -1)
    bad = torch.isfinite(rows).all(dim=1).logical_not()
    if engine.max(float(bad.any())) == 0:
        return
    indices = bad.nonzero().flatten().tolist()
    named = [f"{row} ({origins[row]})" if row < len(origins) else str(row) for row in indices[:8]]
    checkpoints = list_checkpoints(run_dir)
    raise FloatingPointError(
        f"step {step}: {what} is not finite in row(s) {', '.join(named) or 'of another rank'} of rank {engine.rank}; "
        f"last checkpoint: {checkpoints[-1] if checkpoints else 'none'}"
    )
