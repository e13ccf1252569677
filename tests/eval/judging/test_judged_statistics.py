"""Judgments in the statistics: hand-made verdicts, what has no number and why, and biased judges behind a server."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, replace

import numpy as np
import pytest
from judge_runs import judge, matchups
from stub_judge_server import Shown, StubServer, first_slot_wins, longer_wins

from eval.completions.rows import prompt_id_of
from eval.judging.judged_statistics import Suspected, judged_statistics, statistics_text
from eval.judging.matchup import Matchup, Question
from eval.judging.verdict import combine_all, verdict_on


def both(name: str, ab, ba, suspicions=((), ()), lengths=(2, 1)) -> list:
    """Verdicts on one matchup: winners, or statuses where there is none; None was not asked."""
    made = []
    for order, outcome in (("ab", ab), ("ba", ba)):
        if outcome is None:
            continue
        ok = outcome in ("a", "b", "tie")
        question = Question(Matchup(name, "post", "x", "a" * lengths[0], "y", "b" * lengths[1]), order)
        status, winner = ("ok", outcome) if ok else (outcome, None)
        signs = dict(zip(("suspicions_a", "suspicions_b"), suspicions, strict=True))
        made.append(verdict_on(question, status, winner, **signs))
    return made


VERDICTS = [
    *both("win", "a", "a"),
    *both("win, but shouts", "a", "a", (("shouts",), ()), lengths=(10, 4)),
    *both("loss", "b", "b"),
    *both("flip", "a", "b"),
    *both("half", "a", "tie"),
    *both("lost to one who shouts", "b", "b", ((), ("shouts",))),
    *both("refused", "a", "refused"),
    *both("failed", "failed", "failed"),
]


def test_by_hand():
    statistics = judged_statistics(combine_all(VERDICTS))
    rate, bias = statistics.win_rate, statistics.position_bias
    assert (rate.wins, rate.ties, rate.losses, rate.undecided) == (3, 1, 2, 2)
    score = 1 + 1 + 0 + 0.5 + 0.75 + 0
    assert rate.rate == pytest.approx(score / 6)
    assert (rate.worst_case, rate.best_case) == pytest.approx((score / 8, (score + 2) / 8))
    assert rate.low < rate.rate < rate.high
    assert bias.consistency.agreement == pytest.approx(4 / 6)
    # Slots of the six that have both orders: 1+0, 1+0, 0+1, 1+1, 1+0.5, 0+1.
    assert bias.first_share == pytest.approx(7.5 / 12) and (bias.num_calls, bias.undecided) == (12, 3)
    assert bias.p_value == pytest.approx(0.5), "two lean to the first slot, none to the second: 2 / 2^2"
    assert statistics.statuses == {"ok": 13, "refused": 1, "malformed": 0, "truncated": 0, "failed": 2}
    assert (statistics.num_comparisons, statistics.undecided) == (8, 2)
    assert (statistics.mean_length_a, statistics.mean_length_b) == (24 / 8, 11 / 8)
    assert statistics.suspected_a == statistics.suspected_b == Suspected(1, 1.0)
    assert statistics.length_controlled is None
    assert "6 of 8 comparisons are decided, on 6 prompts" in statistics.length_controlled_missing
    text = statistics_text(statistics, "x", "y")
    assert "x against y: 8 comparisons, 3 won, 1 tied, 2 lost, 2 undecided" in text
    assert "win rate 54.2% [" in text and "40.6% if x lost all that is undecided, 65.6% if it won it" in text
    assert "no win rate at equal length: 6 of 8" in text
    assert "same verdict in both orders: 66.7% [" in text and "first slot wins: 62.5% [" in text
    assert "13 ok, 1 refused, 0 malformed, 0 truncated, 2 failed" in text
    assert "1 responses of y look like attempts to sway the judge; they won 1" in text


def test_each_prompt_counts_once():
    """Nine responses to one prompt and one to another: the rate is the mean of the two prompts, by each seed."""
    verdicts = [replace(v, seed=seed) for seed in range(9) for v in both("p", "a", "a")]
    verdicts += both("q", "b", "b")
    rate = judged_statistics(combine_all(verdicts)).win_rate
    assert (rate.n, rate.num_prompts, rate.wins, rate.rate) == (10, 2, 9, 0.5)


def test_nothing_decided_is_said_and_is_no_error():
    statistics = judged_statistics(
        combine_all(both("p", "refused", "malformed") + both("q", "failed", "failed"))
    )
    assert statistics.win_rate is statistics.length_controlled is statistics.position_bias is None
    assert "all 2 comparisons are undecided" in statistics.win_rate_missing
    assert "0 of 2 comparisons are decided" in statistics.length_controlled_missing
    assert "none of 2 comparisons has all its verdicts" in statistics.position_bias_missing
    assert statistics.undecided == 2 and statistics.statuses["refused"] == 1
    text = statistics_text(statistics, "x", "y")
    assert "2 comparisons, 2 undecided" in text and "no win rate: all 2" in text


def test_nothing_at_all_is_said_too():
    statistics = judged_statistics([])
    assert (statistics.num_comparisons, statistics.win_rate, statistics.mean_length_a) == (0, None, None)
    assert "no rows" in statistics.win_rate_missing
    assert statistics_text(statistics, "x", "y") == "x against y: no verdicts"


def test_json_holds_no_nan():
    """Equal lengths have no slope, and a judge of one word no kappa."""
    verdicts = [v for i in range(12) for v in both(f"p{i}", "a", "a", lengths=(3, 3))]
    statistics = judged_statistics(combine_all(verdicts))
    text = json.dumps(asdict(statistics), allow_nan=False)
    assert statistics.length_controlled.slope is None and statistics.position_bias.consistency.kappa is None
    assert json.loads(text)["win_rate"]["rate"] == 1.0


def test_a_run_that_stopped_between_the_orders():
    """What has one order of two is undecided, and says nothing of the slots."""
    verdicts = [*both("p", "a", None), *both("q", "a", "b"), *both("r", None, "b")]
    statistics = judged_statistics(combine_all(verdicts))
    assert (statistics.undecided, statistics.win_rate.rate) == (2, 0.5)
    assert (statistics.position_bias.num_calls, statistics.position_bias.first_share) == (2, 1.0)
    halves = judged_statistics(combine_all(both("p", "a", None)))
    assert halves.position_bias is None and halves.win_rate is None


def test_one_order_was_asked():
    verdicts = [*both("p", "a", None), *both("q", None, "a"), *both("r", "refused", None)]
    statistics = judged_statistics(combine_all(verdicts, orders="one"))
    assert statistics.position_bias.first_share == 0.5 and statistics.position_bias.consistency is None
    assert (statistics.win_rate.rate, statistics.undecided) == (1.0, 1)
    assert "same verdict" not in statistics_text(statistics, "x", "y")


def test_pairs_of_systems_are_not_pooled():
    other = [replace(v, system_b="z") for v in both("p", "a", "a")]
    with pytest.raises(ValueError, match="several pairs of systems"):
        judged_statistics(combine_all(both("p", "a", "a") + other))


# --- biased judges behind a server ------------------------------------------------------------------------


def uneven(num: int, seed: int) -> list[Matchup]:
    """Two systems of equal merit; a is mostly the longer one."""
    rng = random.Random(seed)
    made = []
    for i in range(num):
        length_a, length_b = (max(1, round(rng.gauss(mean, 12))) for mean in (60, 50))
        post = f"post {i}"
        made.append(Matchup(prompt_id_of(post), post, "a", "a" * length_a, "b", "b" * length_b))
    return made


def likes_length(shown: Shown, count: int) -> str:
    """Prefers the longer one by a logistic in the difference, with luck that belongs to the pair, not to the slot."""
    a, b = (shown.a, shown.b) if shown.a[0] == "a" else (shown.b, shown.a)
    luck = random.Random(shown.material).random()
    a_wins = luck < 1 / (1 + math.exp(-(len(a) - len(b)) / 10))
    return "A" if a_wins == (shown.a[0] == "a") else "B"


def test_a_taste_for_length_shows_and_is_taken_out(tmp_path):
    with StubServer(likes_length) as server:
        run = judge(server, tmp_path / "s.sqlite", uneven(150, seed=1))
    statistics = judged_statistics(run.judgments)
    controlled = statistics.length_controlled
    assert statistics.win_rate.low > 0.5, "the longer system seems the better one"
    assert controlled.slope_low > 0 and controlled.low < 0.5 < controlled.high
    assert statistics.mean_length_a > statistics.mean_length_b + 5
    assert statistics.position_bias.consistency.agreement == 1.0


def test_a_judge_of_the_first_slot_is_worth_nothing(tmp_path):
    with StubServer(first_slot_wins) as server:
        run = judge(server, tmp_path / "s.sqlite", matchups(12))
    statistics = judged_statistics(run.judgments)
    bias, rate = statistics.position_bias, statistics.win_rate
    assert rate.rate == 0.5 and rate.low == pytest.approx(0.5 * 0.025 ** (1 / 12))
    assert bias.consistency.agreement == 0.0 and bias.consistency.high < 0.3
    assert (bias.first_share, bias.first_twice) == (1.0, 12) and bias.p_value == pytest.approx(2 / 2**12)
    text = statistics_text(statistics, "x", "y")
    assert "same verdict in both orders: 0.0% [0.0%," in text and "first slot wins: 100.0% [" in text


def test_a_judge_of_length_alone_gains_nothing_where_lengths_are_equal(tmp_path):
    equal = [
        Matchup(prompt_id_of(str(i)), f"post {i}", "x", f" {i:05d}", "y", f" {i:04d}a") for i in range(12)
    ]
    with StubServer(longer_wins) as server:
        run = judge(server, tmp_path / "s.sqlite", equal)
    statistics = judged_statistics(run.judgments)
    assert statistics.win_rate.rate == 0.5 and statistics.position_bias.consistency.agreement == 0.0
    assert np.isclose(statistics.length_controlled.rate, 0.5)
