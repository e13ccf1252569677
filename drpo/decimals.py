"""Whole numbers of products of decimal fractions, which floating point misses by a rounding error."""

from __future__ import annotations

import math

DIGITS = 9
"Decimal places that count; a product of a setting and a count has fewer."


def decimal_floor(product: float) -> int:
    """Return the floor of a product as it is in decimals: 29 for 0.29 * 100, which is 28.999999999999996 in floats."""
    return math.floor(round(product, DIGITS))


def decimal_ceil(product: float) -> int:
    """Return the ceiling of a product as it is in decimals: 7 for 0.07 * 100, which is 7.000000000000001 in floats."""
    return math.ceil(round(product, DIGITS))
