"""Sample sizes: published figures, and simulation of the power that they promise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from eval.statistics.sample_size import detectable_difference, prompts_for_difference, prompts_for_half_width


def test_known_sample_sizes():
    # 1.96^2 / 4 / 0.03^2 = 1067.1, and so on: the usual sizes of opinion polls.
    assert [prompts_for_half_width(h) for h in (0.03, 0.02, 0.01)] == [1068, 2401, 9604]
    assert prompts_for_half_width(0.03, rate=0.9) == 385  # 0.36 of the worst case
    assert prompts_for_half_width(0.03, confidence=0.9) == 752


def test_known_paired_sample_size():
    # (1.95996 + 0.84162)^2 (0.5 / 0.05)^2 = 784.9 by the normal formula; Student's t asks for two more.
    assert prompts_for_difference(0.05, 0.5) == 787
    assert prompts_for_difference(-0.05, 0.5) == 787


def test_power_by_simulation():
    rng = np.random.default_rng(0)
    size = prompts_for_difference(0.2, np.sqrt(0.5 - 0.2**2), power=0.9)
    differences = rng.choice([1, 0, -1], p=[0.35, 0.5, 0.15], size=(4000, size))
    assert np.mean(ttest_1samp(differences, 0, axis=1).pvalue <= 0.05) == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("size", [5, 60, 2000])
def test_the_detectable_difference_is_the_inverse(size):
    difference = detectable_difference(size, 0.4)
    assert (
        prompts_for_difference(difference * 1.0001, 0.4)
        <= size
        < prompts_for_difference(difference * 0.99, 0.4) + 1
    )
    assert detectable_difference(size, 0.8) == pytest.approx(2 * difference)


def test_a_huge_effect_needs_few_prompts():
    assert 2 <= prompts_for_difference(1, 0.1) <= 4
    assert prompts_for_difference(1, 1e-6) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prompts_for_half_width(3), "half_width must be between 0 and 1"),
        (lambda: prompts_for_half_width(0.03, rate=1), "rate must be between 0 and 1"),
        (lambda: prompts_for_difference(0, 0.5), "difference must be in"),
        (lambda: prompts_for_difference(0.1, 0), "sd must be > 0"),
        (lambda: prompts_for_difference(0.1, 0.5, power=0.01), "power must be between"),
        (lambda: detectable_difference(1, 0.5), "num_prompts must be at least 2"),
        (lambda: prompts_for_half_width(0.03, confidence=95), "confidence must be between 0 and 1"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
