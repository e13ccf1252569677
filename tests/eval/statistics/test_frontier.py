"""The Pareto front against a loop."""

from __future__ import annotations

import numpy as np
import pytest

from eval.statistics.frontier import frontier, pareto_front
from eval.statistics.intervals import Interval

nan = float("nan")


# --- front ------------------------------------------------------------------------------------------------


def test_the_front_by_hand():
    #         best   beaten  cheap  equal to the first  beaten by the first at its KL
    kl = [2.0, 3.0, 0.5, 2.0, 2.0]
    reward = [1.0, 0.9, 0.1, 1.0, 0.8]
    assert pareto_front(kl, reward).tolist() == [True, False, True, True, False]


@pytest.mark.parametrize("seed", range(5))
def test_the_front_equals_a_loop(seed):
    kl, reward = np.random.default_rng(seed).integers(0, 6, (2, 25)).astype(float)
    expected = [
        not any(
            (k <= kl[i] and r >= reward[i]) and (k < kl[i] or r > reward[i])
            for k, r in zip(kl, reward, strict=True)
        )
        for i in range(25)
    ]
    assert pareto_front(kl, reward).tolist() == expected


def test_the_frontier_lists_policies_by_kl():
    def at(value):
        return Interval(value, value - 0.1, value + 0.1, 50, "bca")

    points = frontier(["ppo", "sft", "dpo"], [at(3.0), at(0.0), at(4.0)], [at(2.0), at(0.5), at(1.0)])
    assert [(p.system, p.on_front) for p in points] == [("sft", True), ("ppo", True), ("dpo", False)]
    assert points[1].kl == at(3.0)
    assert points[1].reward == at(2.0)


def test_bad_points_are_refused():
    with pytest.raises(ValueError, match="kl is nan in 1 of 2"):
        pareto_front([nan, 1], [1, 1])
    with pytest.raises(ValueError, match="2 KLs but 1 rewards"):
        pareto_front([1, 2], [1])
    one = Interval(1, 1, 1, 5, "bca")
    with pytest.raises(ValueError, match="ppo given twice"):
        frontier(["ppo", "ppo"], [one] * 2, [one] * 2)
    with pytest.raises(ValueError, match="1 systems, 0 KLs and 1 rewards"):
        frontier(["ppo"], [], [one])
    with pytest.raises(ValueError, match="kl has no rows"):
        frontier([], [], [])
