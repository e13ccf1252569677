"""Where rollouts start: prompts, resets to the data, to own rollouts and to the initial policy, and their memory."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from drpo.data.encode import Example
from drpo.data.records import Record
from drpo.rollout.generator import Generator, RolloutConfig, Vocabulary
from drpo.rollout.resets import ResetConfig
from drpo.rollout.sampler import SamplingConfig
from drpo.rollout.starts import Start, Starts

STOP = 0


@pytest.fixture
def examples() -> list[Example]:
    """Five prompts i with references of 3 + i tokens 100 + i, and the stop token."""
    return [
        Example(Record(prompt=str(i)), query_ids=[i], completion_ids=[100 + i] * (3 + i) + [STOP])
        for i in range(5)
    ]


def drawing(examples, reset=None, seed=0, sample_initial=None, **rollout) -> Starts:
    rollout = RolloutConfig(**{"batch_size": 4, "max_response_length": 50, **rollout})
    vocabulary = Vocabulary(pad_id=99, stop_ids=(STOP,), suppressed_ids=())
    generator = Generator(None, None, vocabulary, SamplingConfig(), rollout.max_response_length, 8)
    return Starts(examples, reset or ResetConfig(), rollout, generator, seed, sample_initial)


def observe(drawn: Starts, starts, responses, scores, source_scores=None) -> None:
    """Observe rollouts that have all ended."""
    drawn.observe(starts, responses, scores, [True] * len(starts), source_scores)


def starts_of(examples, episodes, reset=None, seed=0, **rollout) -> list[Start]:
    return drawing(examples, reset, seed, **rollout).draw(episodes, 0.0)


def groups_of(starts: list[Start], size: int) -> list[list[Start]]:
    return [starts[i : i + size] for i in range(0, len(starts), size)]


def test_starts_do_not_depend_on_how_episodes_are_batched(examples):
    whole = starts_of(examples, range(0, 24))
    assert starts_of(examples, range(0, 7)) + starts_of(examples, range(7, 24)) == whole
    assert starts_of(examples, range(16, 20)) == whole[16:20]


def test_a_prefix_is_the_beginning_of_the_source(examples):
    for start in starts_of(examples, range(200)):
        source = start.example.completion_ids
        assert list(start.prefix) == source[: len(start.prefix)]
        assert len(start.prefix) < len(source)
        assert list(start.source) == source


def test_rollouts_of_one_prompt_share_it_and_have_their_own_resets(examples):
    starts = starts_of(examples, range(100), rollouts_per_prompt=4)
    groups = [starts[i : i + 4] for i in range(0, 100, 4)]
    assert all(len({s.example.record.prompt for s in group}) == 1 for group in groups)
    assert any(len({len(s.prefix) for s in group}) > 1 for group in groups)


def test_every_pass_sees_every_prompt_once(examples):
    prompts = [s.example.record.prompt for s in starts_of(examples, range(15))]
    for first in (0, 5, 10):
        assert sorted(prompts[first : first + 5]) == ["0", "1", "2", "3", "4"]


def test_proportion_zero_needs_no_source():
    rows = [Example(Record(prompt="p"), query_ids=[1])]
    starts = starts_of(rows, range(3), ResetConfig(proportion=0.0))
    assert all(start.prefix == () == start.source for start in starts)


def test_the_prompts_of_a_run_do_not_depend_on_the_resets(examples):
    """PPO and DR-PO with one seed see the same prompts in the same order."""
    ppo = starts_of(examples, range(40), ResetConfig(proportion=0.0))
    drpo = starts_of(examples, range(40), ResetConfig(proportion=1.0))
    assert [s.example.record.prompt for s in ppo] == [s.example.record.prompt for s in drpo]


# --- one state for all rollouts of a prompt ---------------------------------------------------------------


def test_rollouts_of_a_prompt_share_their_state(examples):
    starts = starts_of(examples, range(200), ResetConfig(per="prompt", proportion=0.5), rollouts_per_prompt=4)
    assert 0 < sum(bool(start.prefix) for start in starts) < 200
    for group in groups_of(starts, 4):
        assert len({(start.example.record.prompt, start.prefix) for start in group}) == 1


def test_a_shared_state_is_drawn_as_the_state_of_its_first_rollout(examples):
    shared = starts_of(examples, range(40), ResetConfig(per="prompt"), rollouts_per_prompt=4)
    apart = starts_of(examples, range(40), ResetConfig(), rollouts_per_prompt=4)
    assert [group[0] for group in groups_of(shared, 4)] == [group[0] for group in groups_of(apart, 4)]


def test_one_rollout_of_a_prompt_shares_nothing(examples):
    assert starts_of(examples, range(40), ResetConfig(per="prompt")) == starts_of(examples, range(40))


# --- own rollouts -----------------------------------------------------------------------------------------


def own(**settings) -> ResetConfig:
    return ResetConfig(source="own", min_length=1, own=settings)


def test_the_first_rollouts_start_from_their_prompts(examples):
    starts = drawing(examples, own()).draw(range(4), 0.0)
    assert starts == [
        Start(s.episode, s.example) for s in starts_of(examples, range(4), ResetConfig(proportion=0))
    ]


@pytest.mark.parametrize("which, rows", [("best", (1, 2)), ("worst", (0, 3))])
def test_resets_take_prompt_and_response_of_the_best_or_worst_earlier_rollouts(examples, which, rows):
    drawn = drawing(examples, own(share=0.5, which=which))
    starts = drawn.draw(range(4), 0.0)
    responses = [[10 + row, 20 + row, 30 + row, STOP] for row in range(4)]
    observe(drawn, starts, responses, [1.0, 4.0, 3.0, 2.0])
    later = drawn.draw(range(4, 204), 0.1)
    seen = Counter((start.example.record.prompt, start.prefix[0]) for start in later)
    assert set(seen) == {(starts[row].example.record.prompt, 10 + row) for row in rows}
    assert min(seen.values()) > 60  # of 200, evenly
    assert {len(start.prefix) for start in later} == {1, 2, 3}
    assert all(start.prefix == tuple(responses[start.prefix[0] - 10][: len(start.prefix)]) for start in later)


@pytest.mark.parametrize("min_length", [0, 1])
def test_without_a_prefix_that_is_allowed_rollouts_start_from_their_own_prompts(examples, min_length):
    """Not from the prompts of the earlier rollouts."""
    drawn = drawing(examples, ResetConfig(source="own", min_length=min_length))
    observe(drawn, drawn.draw(range(4), 0.0), [[STOP]] * 4, [1.0, 2.0, 3.0, 4.0])
    assert drawn.draw(range(4, 20), 0.0) == starts_of(examples, range(4, 20), ResetConfig(proportion=0))


@pytest.mark.parametrize("source", ["own", "initial"])
def test_after_the_lengths_have_ended_nothing_is_reset_nor_sampled_for_it(examples, source):
    def sample_initial(starts):
        assert not starts
        return []

    reset = ResetConfig(source=source, length_schedule="linear", schedule_end=0.5)
    drawn = drawing(examples, reset, sample_initial=sample_initial)
    if source == "own":
        observe(drawn, drawn.draw(range(4), 0.0), [[7, 8, 9, STOP]] * 4, [1.0, 2.0, 3.0, 4.0])
    assert drawn.draw(range(4, 20), 0.5) == starts_of(examples, range(4, 20), ResetConfig(proportion=0))


def test_the_buffer_holds_the_newest_rollouts(examples):
    drawn = drawing(examples, own(size=4, share=1.0))
    for step, first in enumerate((10, 50)):
        starts = drawn.draw(range(4 * step, 4 * step + 4), 0.0)
        observe(drawn, starts, [[first + row] * 3 + [STOP] for row in range(4)], [100.0 - first] * 4)
    assert {start.prefix[0] for start in drawn.draw(range(8, 108), 0.0)} == {50, 51, 52, 53}


def test_of_equal_scores_the_newer_rollout_is_taken(examples):
    drawn = drawing(examples, own(share=0.25))
    observe(drawn, drawn.draw(range(4), 0.0), [[10 + row] * 3 + [STOP] for row in range(4)], [1.0] * 4)
    assert {start.prefix[0] for start in drawn.draw(range(4, 24), 0.0)} == {13}


# --- the initial policy -----------------------------------------------------------------------------------


def test_resets_to_the_initial_policy_ask_it_once_for_each_state(examples):
    asked = []

    def sample_initial(starts):
        asked.append([start.episode for start in starts])
        return [[200 + start.episode] * 6 + [STOP, 77] for start in starts]

    reset = ResetConfig(source="initial", per="prompt", min_length=1)
    starts = drawing(examples, reset, sample_initial=sample_initial, rollouts_per_prompt=2).draw(
        range(8), 0.0
    )
    assert asked == [[0, 2, 4, 6]]
    for group in groups_of(starts, 2):
        assert len({start.prefix for start in group}) == 1
        assert set(group[0].prefix) == {200 + group[0].episode}
        assert len(group[0].source) == 7  # cut at its stop token


def test_rollouts_from_the_prompt_do_not_ask_the_initial_policy(examples):
    def sample_initial(starts):
        assert starts == []
        return []

    reset = ResetConfig(source="initial", proportion=0.0)
    assert drawing(examples, reset, sample_initial=sample_initial).draw(range(8), 0.0) == starts_of(
        examples, range(8), ResetConfig(proportion=0.0)
    )


# --- adaptive lengths -------------------------------------------------------------------------------------


def adaptive(**settings) -> ResetConfig:
    return ResetConfig(length="adaptive", adaptive={"target": "score", **settings})


def test_prefixes_become_shorter_while_rollouts_succeed_and_longer_while_they_fail(examples):
    # every prompt is new once: position 1, then 1 - 0.5 * (1 - 0.5) = 0.75 after a step without failures
    drawn = drawing(examples, adaptive(rate=0.5, spread=0.0))
    starts = drawn.draw(range(2), 0.0)
    assert [len(start.prefix) for start in starts] == [len(s.example.completion_ids) - 1 for s in starts]
    observe(drawn, starts, [[1]] * 2, [0.0, 5.0])
    new = drawn.draw(range(2, 4), 0.0)
    expected = [0.75 * (len(start.example.completion_ids) - 1) for start in new]
    assert all(abs(len(start.prefix) - mean) < 1 for start, mean in zip(new, expected, strict=True))
    observe(drawn, new, [[1]] * 2, [-0.1, -0.1])  # failures: back to 0.75 + 0.5 * 0.5 = 1
    last = drawn.draw(range(4, 5), 0.0)
    assert len(last[0].prefix) == len(last[0].example.completion_ids) - 1


def test_new_prompts_start_at_different_shares_of_their_responses(examples):
    many = [
        Example(Record(prompt=str(i)), query_ids=[i], completion_ids=[7] * 100 + [STOP]) for i in range(200)
    ]
    starts = drawing(many, adaptive(start=0.5, spread=0.2), max_response_length=200).draw(range(200), 0.0)
    lengths = sorted(len(start.prefix) for start in starts)
    assert 30 <= lengths[0] < 35 and 65 < lengths[-1] <= 70  # 0.5 ± 0.2 of the lengths 0 to 100
    assert abs(sum(lengths) / 200 - 50) < 4 * 40 / 12**0.5 / 200**0.5


def test_a_group_succeeds_by_the_share_of_its_rollouts(examples):
    drawn = drawing(examples[:1], adaptive(success=0.5, spread=0.0), rollouts_per_prompt=4)
    observe(drawn, drawn.draw(range(4), 0.0), [[1]] * 4, [1.0, 1.0, -1.0, -1.0])
    assert drawn.state_dict()["search"]["intervals"] == {"0": [0.75, 1.0]}  # 1 is enough
    drawn = drawing(examples[:1], adaptive(success=0.75, start=0.5, spread=0.0), rollouts_per_prompt=4)
    observe(drawn, drawn.draw(range(4), 0.0), [[1]] * 4, [1.0, 1.0, -1.0, -1.0])
    assert drawn.state_dict()["search"]["intervals"] == {"0": [0.5, 1.0]}


def test_rollouts_succeed_that_come_near_the_response_they_are_reset_to(examples):
    """Each has a target of its own: 3 - 0.5, -1 - 0.5 and 0 - 0.5."""
    drawn = drawing(examples, adaptive(target="source", margin=0.5, spread=0.0))
    starts = drawn.draw(range(3), 0.0)
    observe(drawn, starts, [[1]] * 3, [2.5, -1.6, -0.4], source_scores=[3.0, -1.0, 0.0])
    assert drawn.state_dict()["search"]["intervals"] == {
        str(examples.index(start.example)): interval
        for start, interval in zip(starts, [[0.75, 1.0], [1.0, 1.0], [0.75, 1.0]], strict=True)
    }


def test_rollouts_that_may_not_succeed_fail_whatever_their_score(examples):
    """They were cut off: their score is not that of a response."""
    drawn = drawing(examples[:1], adaptive(success=0.5, spread=0.0), rollouts_per_prompt=4)
    drawn.observe(drawn.draw(range(4), 0.0), [[1]] * 4, [9.0] * 4, [True, False, False, False])
    assert drawn.state_dict()["search"]["intervals"] == {"0": [1.0, 1.0]}
    drawn.observe(drawn.draw(range(4, 8), 0.0), [[1]] * 4, [9.0] * 4, [True, False, True, False])
    assert drawn.state_dict()["search"]["intervals"] == {"0": [0.75, 1.0]}


def test_rollouts_from_the_prompt_are_no_trials(examples):
    drawn = drawing(examples, ResetConfig(length="adaptive", proportion=1e-12))  # too small for these draws
    observe(drawn, drawn.draw(range(4), 0.0), [[1]] * 4, [9.0] * 4, [9.0] * 4)
    assert drawn.state_dict()["search"] == {"position": 1.0, "intervals": {}}


def test_rollouts_that_had_to_start_there_are_no_trials(examples):
    """The response of prompt 0 has 4 tokens, so a prefix of 3 or more has one length; the others have several."""
    drawn = drawing(examples, ResetConfig(length="adaptive", min_length=3, adaptive={"target": "score"}))
    starts = drawn.draw(range(5), 0.0)
    assert {len(start.prefix) for start in starts if start.example is examples[0]} == {3}
    observe(drawn, starts, [[1]] * 5, [-1.0] * 5)
    assert sorted(drawn.state_dict()["search"]["intervals"]) == ["1", "2", "3", "4"]


def test_responses_that_were_cut_off_are_no_targets(examples):
    """Longer than a rollout may be, or without a stop token in the data: they start rollouts, which are no trials."""
    examples[0].completion_ids.remove(STOP)
    drawn = drawing(examples, ResetConfig(length="adaptive", min_length=1), max_response_length=6)
    starts = drawn.draw(range(5), 0.0)
    assert all(start.prefix for start in starts)
    observe(drawn, starts, [[1]] * 5, [9.0] * 5, source_scores=[0.0] * 5)
    assert sorted(drawn.state_dict()["search"]["intervals"]) == [
        "1",
        "2",
    ]  # of 4 and 5 tokens, and the stop token


# --- resume -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reset",
    [
        ResetConfig(proportion=0.7, proportion_schedule="cosine"),
        ResetConfig(length_schedule="linear", schedule_end=0.8),
        ResetConfig(length="binomial", length_schedule="cosine"),
        ResetConfig(length="curriculum"),
        ResetConfig(source="own", per="prompt", own={"size": 6}),
        ResetConfig(length="adaptive", adaptive={"target": "score", "rate": 0.4}),
        ResetConfig(length="adaptive"),
        ResetConfig(source="own", length="adaptive", per="prompt"),
    ],
)
def test_a_restored_state_draws_on_as_if_nothing_had_happened(examples, reset):
    def run(drawn: Starts, steps: range) -> list[list[Start]]:
        drawn_starts = []
        for step in steps:
            starts = drawn.draw(range(4 * step, 4 * step + 4), step / 10)
            responses = [[*start.prefix, 7, 8, 9, STOP] for start in starts]
            scores, of_sources = ([float((k * s.episode) % 5 - 2) for s in starts] for k in (7, 3))
            observe(drawn, starts, responses, scores, of_sources)
            drawn_starts.append(starts)
        return drawn_starts

    whole = run(drawing(examples, reset, rollouts_per_prompt=2), range(10))
    first = drawing(examples, reset, rollouts_per_prompt=2)
    begun = run(first, range(4))
    state = json.loads(json.dumps(first.state_dict()))
    resumed = drawing(examples, reset, rollouts_per_prompt=2)
    resumed.load_state_dict(state)
    assert begun + run(resumed, range(4, 10)) == whole
