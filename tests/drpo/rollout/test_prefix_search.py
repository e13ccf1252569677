"""The search for the shortest sufficient prefix: bisection by prompt, and the position of new prompts."""

from __future__ import annotations

import numpy as np
import pytest

from drpo.rollout.prefix_search import TOLERANCE, AdaptiveConfig, PrefixSearch


def search(**settings) -> PrefixSearch:
    return PrefixSearch(AdaptiveConfig(**settings))


MIDDLE = 0.5  # places a new prompt where the run stands


def test_a_prompt_is_bisected_to_its_shortest_sufficient_prefix():
    found = search(start=0.5)
    for _ in range(5):
        trial = found.trial(3, MIDDLE)
        found.observe([(trial, float(trial.position >= 0.3))])
    # 0.5 yes, 0.25 no, 0.375 yes, 0.3125 yes, 0.28125 no: between 0.28125 and 0.3125
    assert found.trial(3, MIDDLE).position == pytest.approx(0.296875)


def test_a_prompt_whose_answer_moves_is_searched_again():
    found = search(start=0.5)
    for threshold in (0.7, 0.1, 0.9):  # the policy has forgotten, or learned
        for _ in range(30):
            trial = found.trial(0, MIDDLE)
            found.observe([(trial, float(trial.position >= threshold))])
        assert abs(found.trial(0, MIDDLE).position - threshold) < 0.3
        late = []
        for _ in range(60):
            trial = found.trial(0, MIDDLE)
            found.observe([(trial, float(trial.position >= threshold))])
            late.append(trial.position)
        assert abs(np.median(late) - threshold) < 4 * TOLERANCE


def test_new_prompts_begin_where_the_run_stands():
    found = search(success=0.5, rate=0.4)
    assert found.trial(0, MIDDLE) == (0, 1.0, True)
    found.observe([(found.trial(0, MIDDLE), 1.0), (found.trial(1, MIDDLE), 0.5)])
    assert found.position == pytest.approx(1 - 0.4 * (0.75 - 0.5))
    found.observe([(found.trial(2, MIDDLE), 0.0)])
    assert found.position == 1.0  # never beyond the longest


@pytest.mark.parametrize("uniform, position", [(0.0, 0.4), (0.25, 0.5), (0.75, 0.7), (0.999, 0.7996)])
def test_new_prompts_are_spread_around_it(uniform, position):
    assert search(start=0.6, spread=0.2).trial(0, uniform).position == pytest.approx(position)


def test_the_spread_ends_at_the_shortest_and_longest_prefix():
    assert search(start=0.1, spread=0.2).trial(0, 0.0).position == 0.0
    assert search(start=0.9, spread=0.2).trial(0, 0.9).position == 1.0
    assert search(start=0.7, spread=0.0).trial(0, 0.9).position == 0.7


def test_a_prompt_that_was_seen_is_not_spread():
    found = search(start=0.5, spread=0.2)
    found.observe([(found.trial(0, MIDDLE), 1.0)])
    assert found.trial(0, 0.1) == found.trial(0, 0.9)


def test_only_new_prompts_move_the_position_of_new_prompts():
    found = search()
    found.observe([(found.trial(0, MIDDLE), 1.0)])
    position = found.position
    found.observe([(found.trial(0, MIDDLE), 1.0)])
    assert found.position == position
    assert found.trial(1, MIDDLE) == (1, position, True)


def test_the_position_settles_where_the_target_share_succeeds():
    """Success has probability p, the position itself: the target 0.3 is met at 0.3."""
    found, random = search(success=0.3, rate=0.1), np.random.default_rng(0)
    positions = []
    for step in range(400):
        trials = [found.trial(100 * step + row, MIDDLE) for row in range(32)]
        found.observe([(trial, float(random.random() < trial.position)) for trial in trials])
        positions.append(found.position)
    assert abs(np.mean(positions[100:]) - 0.3) < 0.02


def test_a_share_at_the_target_is_a_success():
    found = search(success=0.25, start=0.5)
    found.observe([(found.trial(0, MIDDLE), 0.25)])
    assert found.trial(0, MIDDLE).position == 0.25


def test_a_prompt_that_is_tried_twice_in_a_step_keeps_an_interval():
    found = search(start=0.8, spread=0.2)
    late, early = found.trial(0, 0.75), found.trial(0, 0.25)  # 0.9 and 0.7
    found.observe([(late, 1.0), (early, 1.0)])  # [0.8, 0.9], which leaves 0.7 aside
    assert found.state_dict()["intervals"]["0"] == pytest.approx([0.45, 0.7])
    assert found.trial(0, MIDDLE).position == pytest.approx(0.575)
