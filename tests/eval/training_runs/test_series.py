"""Curves, thirds and shares of a run, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.training_runs.series import (
    averaged,
    curve,
    fraction_names,
    fraction_shares,
    length_edges,
    length_shares,
    mean,
    mean_length,
    share_blocks,
    start_groups,
    thirds,
)


def drawn(step: int, lengths: dict[int, int], *fractions: int) -> dict:
    counts = [*fractions, *[0] * (11 - len(fractions))]
    return {"step": step, "lengths": {str(h): count for h, count in lengths.items()}, "fractions": counts}


RESETS = [
    drawn(1, {0: 3, 2: 1}, 3, 1),
    drawn(2, {0: 1, 9: 3}, 1, 0, 3),
    drawn(3, {4: 4}, 0, 0, 4),
]


def test_a_curve_has_the_finite_values_alone():
    rows = [{"step": 1, "a": 2.0}, {"step": 2}, {"step": 3, "a": math.nan}, {"step": 4, "a": 5.0}]
    assert curve(rows, "a") == ([1, 4], [2.0, 5.0])


def test_a_mean_is_over_the_steps_that_have_the_metric_and_hides_no_value():
    rows = [{"step": 1, "a": 2.0}, {"step": 2}, {"step": 4, "a": 5.0}]
    assert mean(rows, "a") == 3.5 and mean(rows, "b") is None
    assert math.isnan(mean([*rows, {"step": 5, "a": math.nan}], "a"))
    assert mean([*rows, {"step": 5, "a": math.inf}], "a") == math.inf
    assert curve(rows, "b") == averaged(([], [])) == ([], [])


def test_long_curves_are_averaged_over_blocks():
    assert averaged(([1, 2], [5.0, 7.0])) == ([1, 2], [5.0, 7.0])
    steps, values = averaged((list(range(1, 201)), [float(step) for step in range(1, 201)]))
    assert steps == values == [1.5 + 2 * i for i in range(100)]


def test_groups_are_in_the_order_of_their_start():
    rows = [
        {"step": 1, "prefix_0.5_1/score": 0.0, "from_reset/score": 0.0},
        {"step": 2, "prefix_0_0.5/score": 0.0, "prefix_0_0.5/kl_k3": 0.0, "from_prompt/score": 0.0},
    ]
    assert list(start_groups(rows).items()) == [
        ("from_prompt", "bare prompt"),
        ("prefix_0_0.5", "h/L in (0, 0.5]"),
        ("prefix_0.5_1", "h/L in (0.5, 1]"),
    ]
    assert list(start_groups(rows[:1])) == ["prefix_0.5_1"]


@pytest.mark.parametrize(
    ("num_steps", "names"),
    [
        (7, ["steps 1–2", "steps 3–4", "steps 5–7"]),
        (2, ["step 1", "step 2"]),
        (0, []),
    ],
)
def test_thirds_leave_out_step_0(num_steps, names):
    parts = thirds([{"step": step} for step in range(num_steps + 1)])
    assert list(parts) == names
    assert [row["step"] for rows in parts.values() for row in rows] == list(range(1, num_steps + 1))


def test_shares_are_of_rollouts_not_of_steps():
    assert fraction_names()[:3] == ["bare prompt", "(0, 0.1]", "(0.1, 0.2]"]
    assert (len(fraction_names()), fraction_names()[-1]) == (11, "(0.9, 1]")
    assert fraction_shares(RESETS) == pytest.approx([4 / 12, 1 / 12, 7 / 12, *[0] * 8])
    assert mean_length(RESETS) == (2 + 27 + 16) / 12
    edges, shares = share_blocks(RESETS)
    assert edges == [0.5, 1.5, 2.5, 3.5]
    np.testing.assert_allclose(shares[:3], [[0.75, 0.25, 0], [0.25, 0, 0], [0, 0.75, 1]])


def test_blocks_of_a_long_run_hold_all_its_steps():
    edges, shares = share_blocks([drawn(step, {0: step}, step) for step in range(1, 251)])
    assert (edges[0], edges[-1], len(edges), shares.shape) == (0.5, 250.5, 101, (11, 100))
    assert set(np.diff(edges)) == {2.0, 3.0}


def test_bars_of_lengths_hold_every_length():
    assert length_edges(RESETS) == list(range(11))
    assert length_shares(RESETS, length_edges(RESETS)) == pytest.approx(
        [4 / 12, 0, 1 / 12, 0, 4 / 12, *[0] * 4, 3 / 12]
    )
    wide = length_edges(RESETS, max_bars=4)  # of three lengths each
    assert wide == [0, 3, 6, 9, 12]
    assert length_shares(RESETS, wide) == pytest.approx([5 / 12, 4 / 12, 0, 3 / 12])
