from __future__ import annotations

from collections import Counter

from drpo.data.tasks.demo import DemoConfig, error_kind, needed_items, true_reward
from drpo.data.tasks.demo_errors import ERROR_KINDS, make_faulty_summaries

CONFIG = DemoConfig(num_train=1, num_eval=50)


def test_every_post_has_one_summary_of_every_kind_and_the_kind_is_right():
    summaries = make_faulty_summaries(CONFIG)
    assert Counter(s.kind for s in summaries) == dict.fromkeys(ERROR_KINDS, 50)
    for summary in summaries:
        assert error_kind(summary.record.prompt, summary.response, summary.ended) == summary.kind


def test_the_true_reward_prefers_the_reference_to_every_fault():
    for summary in make_faulty_summaries(CONFIG):
        reference = true_reward(summary.record.prompt, summary.record.completion, True)
        assert reference > true_reward(summary.record.prompt, summary.response, summary.ended)


def test_faults_but_incomplete_ones_have_the_length_of_the_reference():
    for summary in make_faulty_summaries(CONFIG):
        num_needed = len(needed_items(summary.record.prompt))
        if summary.kind == "incomplete":
            assert 1 <= len(summary.response.split()) < num_needed
        else:
            assert len(summary.response.split()) == num_needed


def test_the_same_seed_gives_the_same_summaries():
    assert make_faulty_summaries(CONFIG) == make_faulty_summaries(CONFIG)
