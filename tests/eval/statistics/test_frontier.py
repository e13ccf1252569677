"""The Pareto front against a loop."""

from __future__ import annotations

import numpy as np
import pytest

from eval.statistics.frontier import pareto_front

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


def test_bad_points_are_refused():
    with pytest.raises(ValueError, match="kl is nan in 1 of 2"):
        pareto_front([nan, 1], [1, 1])
    with pytest.raises(ValueError, match="unequal numbers of rows: kl 2, reward 1"):
        pareto_front([1, 2], [1])
    with pytest.raises(ValueError, match="kl has no rows"):
        pareto_front([], [])
