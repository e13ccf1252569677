"""Learning-rate schedules by hand."""

from __future__ import annotations

import math

import pytest

from drpo.schedules import learning_rate_factor


def factors(kind: str, num_steps: int, warmup_steps: int = 0) -> list[float]:
    return [learning_rate_factor(step, num_steps, warmup_steps, kind) for step in range(num_steps + 1)]


def test_linear_goes_from_one_to_zero():
    # The first of four updates runs at the full rate, the last at a quarter: 1 - (update - 1) / num_updates.
    assert factors("linear", 4) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_cosine():
    # (1 + cos(pi k / 6)) / 2 for k = 0, 2, 3, 4, 6 is 1, 3/4, 1/2, 1/4, 0.
    got = factors("cosine", 6)
    assert [got[k] for k in (0, 2, 3, 4, 6)] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert got[1] == pytest.approx((1 + math.sqrt(3) / 2) / 2)


def test_constant():
    assert factors("constant", 3) == [1.0] * 4


def test_warmup_starts_above_zero_and_ends_at_one():
    # Three steps of 1/4, 2/4, 3/4, then 1 at step 3, then four equal steps down to 0 at step 7.
    assert factors("linear", 7, warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert factors("constant", 5, warmup_steps=1) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_never_rises_after_warmup(kind):
    got = factors(kind, 50, warmup_steps=10)
    assert all(later < earlier for earlier, later in zip(got[10:], got[11:], strict=False))
    assert max(got) == got[10] == 1.0 and min(got) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 10, 10, "linear"), "below num_steps"),
        ((0, 10, -1, "linear"), "must be >= 0"),
        ((-1, 10, 0, "linear"), "step is -1"),
        ((11, 10, 0, "constant"), "step is 11"),
        ((0, 10, 0, "polynomial"), "unknown schedule 'polynomial'"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        learning_rate_factor(*arguments)
