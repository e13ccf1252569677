"""Learning-rate schedules."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate_factor(
    step: int, num_steps: int, warmup_steps: int, kind: Literal["linear", "cosine", "constant"]
) -> float:
    """Return the factor of the peak learning rate in optimizer step `step`, counted from 0.

    For step < warmup_steps: (step + 1) / (warmup_steps + 1), so that no step has a rate of 0. Then,
    with p = (step - warmup_steps) / (num_steps - warmup_steps):
        linear 1 - p,    cosine (1 + cos(pi p)) / 2,    constant 1.
    The first two reach 0 at step = num_steps, which is one past the last step taken.
    Raises ValueError on another kind, or unless 0 <= warmup_steps < num_steps and 0 <= step <= num_steps.
    """
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(f"warmup_steps is {warmup_steps}, it must be >= 0 and below num_steps, {num_steps}")
    if not 0 <= step <= num_steps:
        raise ValueError(f"step is {step}, but the schedule runs from 0 to num_steps, {num_steps}")
    if kind not in ("linear", "cosine", "constant"):
        raise ValueError(f"unknown schedule {kind!r}; choose linear, cosine or constant")
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    match kind:
        case "linear":
            return 1 - progress
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case _:
            return 1.0
