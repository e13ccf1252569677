"""Where numbers stand on a chart: from values to pixels, and the round numbers that are written beside an axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LOG_SPAN = 20
"A scale of positive settings is logarithmic when the largest is this many times the smallest."
PAD = 0.05
"Share of the span of the numbers that is left free on either side."

Limits = tuple[float, float | None, float | None]
"A value, and its lower and upper limit if it has any."


@dataclass(frozen=True)
class Scale:
    """Places a number between two pixels, linearly or by its logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """start + (value - low) / (high - low) * (end - start), of the logarithms if `log`."""
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def rounded_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """The multiples of a round step (1, 2 or 5 times a power of ten) from `low` to `high`; low < high."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(math.log(power * factor / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def tick_text(tick: float) -> str:
    return f"{tick:.6g}"


def span(values: Iterable[Limits]) -> tuple[float, float]:
    """The lowest and the highest of all values and limits."""
    numbers = [number for value in values for number in value if number is not None]
    return min(numbers), max(numbers)


def padded(low: float, high: float) -> tuple[float, float]:
    """Some room on either side, also if both are equal."""
    pad = (high - low) * PAD or abs(low) * PAD or 1.0
    return low - pad, high + pad


def settings_scale(settings: Sequence[float], start: float, end: float) -> Scale:
    """For the settings of an ablation: by logarithms when all are positive and far apart."""
    low, high = min(settings), max(settings)
    if low > 0 and high >= LOG_SPAN * low:
        pad = (high / low) ** PAD
        return Scale(low / pad, high * pad, start, end, log=True)
    return Scale(*padded(low, high), start, end)
