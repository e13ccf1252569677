"""Coverage of 95% limits by simulation, for what the tests of the single statistics leave out.

A judge of two orders with luck, a taste for length and one for the first slot; few prompts; several runs a prompt.
"""

from __future__ import annotations

import numpy as np
import pytest

from eval.completions.text_metrics import perplexity_interval
from eval.judging.judged_statistics import JudgedStatistics, judged_statistics
from eval.judging.verdict import Judgment

TIE = 0.15  # share of verdicts that call a tie


def judged(rng: np.random.Generator, num_prompts: int, per_prompt: int = 1) -> list[Judgment]:
    """Verdicts of system x against y in both orders; x is better by a prompt's own amount, and the longer one."""
    size = num_prompts * per_prompt
    merit = np.repeat(rng.normal(0.3, 1.0, num_prompts), per_prompt) + rng.normal(0, 0.5, size)
    lengths = np.maximum(1, rng.normal([[220], [200]], 60, (2, size))).astype(int)
    odds = merit + 0.01 * (lengths[0] - lengths[1])
    slots, winners = [], []
    for sign in (1.0, -1.0):  # x is shown first, then second
        a_wins = rng.random(size) < 1 / (1 + np.exp(-(odds + 0.4 * sign)))
        tie = rng.random(size) < TIE
        winners.append(np.where(tie, 0.5, a_wins))
        slots.append(np.where(tie, 0.5, a_wins if sign > 0 else ~a_wins))
    return [
        Judgment(
            f"p{i // per_prompt}",
            "x",
            "y",
            i % per_prompt,
            float(winners[0][i] + winners[1][i]) / 2,
            bool(winners[0][i] == winners[1][i]),
            (float(slots[0][i]), float(slots[1][i])),
            ("ok", "ok"),
            int(lengths[0][i]),
            int(lengths[1][i]),
            False,
            False,
        )
        for i in range(size)
    ]


def limits(statistics: JudgedStatistics) -> dict[str, tuple[float, float, float]]:
    """name -> value, low, high."""
    rate, length, bias = statistics.win_rate, statistics.length_controlled, statistics.position_bias
    same = bias.consistency
    return {
        "win rate": (rate.rate, rate.low, rate.high),
        "at equal length": (length.rate, length.low, length.high),
        "slope of length": (length.slope, length.slope_low, length.slope_high),
        "consistency": (same.agreement, same.low, same.high),
        "kappa of the orders": (same.kappa, same.kappa_low, same.kappa_high),
        "first slot": (bias.first_share, bias.low, bias.high),
    }


def coverages(num_prompts: int, per_prompt: int, times: int) -> dict[str, float]:
    rng = np.random.default_rng(num_prompts)
    truth = limits(judged_statistics(judged(rng, 100_000)))
    found = dict.fromkeys(truth, 0)
    for _ in range(times):
        for name, (_, low, high) in limits(judged_statistics(judged(rng, num_prompts, per_prompt))).items():
            found[name] += low <= truth[name][0] <= high
    return {name: count / times for name, count in found.items()}


@pytest.mark.parametrize(("num_prompts", "per_prompt"), [(120, 1), (80, 3)])
def test_every_number_of_a_judged_system_covers(num_prompts, per_prompt):
    covered = coverages(num_prompts, per_prompt, 600)
    assert covered == pytest.approx(dict.fromkeys(covered, 0.95), abs=0.02), covered


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_prompts", "per_prompt"), [(20, 1), (40, 1), (120, 1), (500, 1), (40, 3), (120, 3)]
)
def test_every_number_of_a_judged_system_covers_for_few_prompts_and_many(num_prompts, per_prompt):
    covered = coverages(num_prompts, per_prompt, 3000)
    print(
        f"prompts {num_prompts}, responses {per_prompt}: "
        + ", ".join(f"{n} {c:.1%}" for n, c in covered.items())
    )
    assert covered == pytest.approx(dict.fromkeys(covered, 0.95), abs=0.02 if num_prompts > 20 else 0.03), (
        covered
    )


def test_perplexity_covers():
    """A ratio of sums: long responses count more, and are the more surprising ones here."""
    rng = np.random.default_rng(3)
    size, per_prompt = 100, 2
    prompts = np.repeat(np.arange(size), per_prompt)

    def draw(num: int):
        hard = np.repeat(rng.gamma(25, 0.1, num), per_prompt)
        counts = rng.poisson(10 * hard) + 1
        return hard * counts * rng.gamma(20, 1 / 20, len(counts)), counts

    nlls, counts = draw(400_000)
    truth, times, covered = np.exp(nlls.sum() / counts.sum()), 4000, 0
    for _ in range(times):
        interval = perplexity_interval(*draw(size), prompts)
        covered += interval.low <= truth <= interval.high
    assert covered / times == pytest.approx(0.95, abs=0.025)
