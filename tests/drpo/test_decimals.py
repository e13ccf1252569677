"""Whole numbers of products that floating point misses from below and from above."""

from __future__ import annotations

import pytest

from drpo.decimals import decimal_ceil, decimal_floor


@pytest.mark.parametrize(
    ("product", "floor", "ceil"),
    [
        (0.29 * 100, 29, 29),  # 28.999999999999996
        (0.07 * 100, 7, 7),  # 7.000000000000001
        (0.3 * 9, 2, 3),
        (1e-6, 0, 1),
        (0.0, 0, 0),
    ],
)
def test_products_of_decimals_are_the_decimal_ones(product, floor, ceil):
    assert (decimal_floor(product), decimal_ceil(product)) == (floor, ceil)
