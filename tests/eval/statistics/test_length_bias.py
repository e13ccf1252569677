"""Length bias: values by hand, mirrored pairs through plain least squares, and the judge of lengths."""

from __future__ import annotations

import numpy as np
import pytest

from eval.statistics.length_bias import EQUAL, LONGER, SHORTER, length_bias, partial_correlation


def test_length_bias_by_hand():
    #   longer and right, shorter and wrong, shorter and right, equal and right
    found = length_bias([3.0, -1.0, 1.0, 1.0], [2, -2, -1, 0])
    products = sum((m - 1) * (d + 0.25) for m, d in zip([3, -1, 1, 1], [2, -2, -1, 0], strict=True))
    squares = sum((d + 0.25) ** 2 for d in [2, -2, -1, 0])
    assert found.slope.value == pytest.approx(products / squares)
    assert found.correlation == pytest.approx((6 + 2 - 1) / np.sqrt(12 * 9))
    assert found.partial_correlation == pytest.approx(products / np.sqrt(8 * squares))
    assert found.mean_difference == -0.25
    judge = found.length_judge
    assert (judge.right, judge.ties, judge.wrong, judge.accuracy.value) == (1, 1, 2, 0.375)
    assert {name: (part.right, part.n) for name, part in found.by_length.items()} == {
        SHORTER: (1, 2),
        LONGER: (1, 1),
        EQUAL: (1, 1),
    }


def test_mirrored_pairs_with_their_label_give_the_same():
    rng = np.random.default_rng(0)
    lengths = rng.integers(-20, 20, 80).astype(float)
    margins = 0.5 + 0.03 * lengths + rng.normal(0, 1, 80)
    label = np.repeat([1.0, -1.0], 80)
    both_margins, both_lengths = np.concatenate([margins, -margins]), np.concatenate([lengths, -lengths])
    found = length_bias(margins, lengths)
    design = np.stack([both_lengths, label], axis=1)
    assert found.slope.value == pytest.approx(np.linalg.lstsq(design, both_margins, rcond=None)[0][0])
    assert found.partial_correlation == pytest.approx(partial_correlation(both_margins, both_lengths, label))
    assert found.correlation == pytest.approx(np.corrcoef(both_margins, both_lengths)[0, 1])


def test_partial_correlation_equals_the_formula():
    """r_xy.z = (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2))."""
    x, y, z = np.random.default_rng(2).normal(size=(3, 50))
    y = y + 0.5 * z
    x = x - 0.3 * z
    xy, xz, yz = (np.corrcoef(*pair)[0, 1] for pair in ((x, y), (x, z), (y, z)))
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert partial_correlation(x, y, z) == pytest.approx(expected)


def test_a_gap_that_explains_all_leaves_no_correlation():
    rng = np.random.default_rng(3)
    gaps = rng.normal(size=300)
    lengths, margins = gaps + rng.normal(0, 0.5, 300), gaps + rng.normal(0, 0.5, 300)
    found = length_bias(margins, lengths, gaps)
    assert found.partial_correlation > 0.6 and abs(found.given_gap) < 0.15
    assert length_bias(margins, lengths).given_gap is None


def test_the_slope_is_found_and_repeats_do_not_narrow_it():
    rng = np.random.default_rng(4)
    lengths = rng.integers(-30, 30, 200)
    margins = 0.02 * lengths + rng.normal(0, 0.5, 200)
    once = length_bias(margins, lengths, prompt_ids=np.arange(200)).slope
    assert once.low < 0.02 < once.high and once.low > 0
    often = length_bias(
        *(np.repeat(x, 4) for x in (margins, lengths)), prompt_ids=np.repeat(np.arange(200), 4)
    )
    assert often.slope.high - often.slope.low == pytest.approx(once.high - once.low, rel=0.02)


def test_lengths_that_do_not_vary_have_no_slope():
    found = length_bias([1.0, -1.0, 2.0], [0, 0, 0])
    assert (found.slope, found.correlation, found.partial_correlation) == (None, None, None)
    assert found.length_judge.accuracy.value == 0.5
    assert np.isnan(length_bias([1.0, -1.0], [1, 2]).slope.low)
