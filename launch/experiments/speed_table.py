"""From measurements of the speed benchmark to its table: ratios by round, shares of the machine's rate, losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from drpo.config import ConfigError
from launch.experiments.results import markdown_table, median_and_range
from launch.experiments.speed_cases import Case

NAMES = {"trl": "TRL", "before": "earlier commit", "prompts": "PPO", "pairs": "pairs apart"}
PARTS = {"step": "step", "learn": "all but sampling", "update": "update", "generate": "sampling"}


@dataclass(frozen=True)
class Measurement:
    """Result of one process of one side: seconds and losses by step."""

    seconds: dict[str, list[float]]
    losses: list[float]
    peak_memory_gib: float

    def mean_seconds(self, part: str, warmup_steps: int) -> float | None:
        """Return the mean seconds of a part over the steps that count; None where it is not timed."""
        return float(np.mean(self.seconds[part][warmup_steps:])) if part in self.seconds else None


@dataclass(frozen=True)
class Scale:
    """Steps that do not count, the machine's rate of products in FLOP/s, and how far losses may differ."""

    warmup_steps: int
    matmul_rate: float
    loss_tolerance: float


def compare(
    name: str,
    case: Case,
    rounds: Mapping[str, Sequence[Measurement]],
    flops: Mapping[str, float],
    scale: Scale,
) -> list[dict[str, Any]]:
    """Return the rows of a case, one for each other side and part; raise ConfigError if the losses differ.

    Args:
        name: of the case.
        case: its parts and sides.
        rounds: measurements of ours and of every other side, round by round.
        flops: operations of a step's parts.
        scale: what the numbers are held against.
    """
    rows, ours = [], rounds["ours"]
    for side in rounds:
        if side == "ours":
            continue
        others = rounds[side]
        same_work = side == "before" or (
            side == "trl" and not case.is_online and case.trainable_layers is None
        )
        difference = loss_difference(name, side, ours, others, scale.loss_tolerance) if same_work else None
        for part in case.parts:
            mine, theirs = (
                [m.mean_seconds(part, scale.warmup_steps) for m in measured] for measured in (ours, others)
            )
            timed = None not in theirs
            possible = flops[part] / scale.matmul_rate if part in flops else None
            rows.append(
                {
                    "case": name,
                    "part": part,
                    "beside": side,
                    "ours": mine,
                    "other": theirs if timed else None,
                    "faster": [b / a for a, b in zip(mine, theirs, strict=True)] if timed else None,
                    "ours_of_peak": [possible / seconds for seconds in mine] if possible else None,
                    "other_of_peak": [possible / seconds for seconds in theirs]
                    if possible and timed
                    else None,
                    "memory": [
                        a.peak_memory_gib / b.peak_memory_gib for a, b in zip(ours, others, strict=True)
                    ],
                    "ours_peak_gib": [m.peak_memory_gib for m in ours],
                    "other_peak_gib": [m.peak_memory_gib for m in others],
                    "loss_difference": difference,
                }
            )
    return rows


def loss_difference(
    name: str, side: str, ours: Sequence[Measurement], others: Sequence[Measurement], tolerance: float
) -> float:
    """Return the largest difference of two losses of a step, relative to losses above 1.

    Args:
        name: of the case.
        side: name of the other side.
        ours: our measurements.
        others: as many of the other side, with as many steps.
        tolerance: what the difference must not exceed.

    Raises ConfigError when it does: the two sides did not do the same work.
    """
    pairs = [pair for a, b in zip(ours, others, strict=True) for pair in zip(a.losses, b.losses, strict=True)]
    difference = float(np.max([abs(a - b) / max(1.0, abs(b)) for a, b in pairs]))  # nan if one is
    if not difference <= tolerance:
        raise ConfigError(
            f"{name}: the losses differ from those of {NAMES[side]} by up to {difference:.2g}, so the work was not the "
            f"same: {ours[0].losses} and {others[0].losses}"
        )
    return difference


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the table: medians over the rounds, and the ranges of the ratios."""

    def seconds(times: Sequence[float] | None) -> str:
        return "-" if times is None else f"{np.median(times):.2f}"

    def share(ratios: Sequence[float] | None) -> str:
        return "-" if ratios is None else f"{100 * np.median(ratios):.0f}%"

    return markdown_table(
        [
            {
                "case": row["case"],
                "time of": PARTS[row["part"]],
                "ours, s": seconds(row["ours"]),
                "beside": NAMES[row["beside"]],
                "other, s": seconds(row["other"]),
                "times faster": "-" if row["faster"] is None else median_and_range(row["faster"]),
                "of peak: ours / other": f"{share(row['ours_of_peak'])} / {share(row['other_of_peak'])}",
                "share of the memory": median_and_range(row["memory"]),
                "losses differ by": "-"
                if row["loss_difference"] is None
                else f"{row['loss_difference']:.1e}",
            }
            for row in rows
        ]
    )
