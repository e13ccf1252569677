from __future__ import annotations

import json
import random
from itertools import combinations

import pytest
from real_data import DATA
from tiny_tokenizers import byte_level, single_bytes

from drpo.data.encode import Example, encode_response
from drpo.data.load import DataConfig, load_examples
from drpo.data.records import DataError, Record
from drpo.data.tasks.demo import DemoConfig
from drpo.trainers.preference.curriculum import CurriculumConfig, build_stages

FILE = DATA / "tldr/axis.jsonl"


def ranked(prompt: str, *scores: float, texts: tuple[str, ...] = ()) -> Example:
    """An example whose response j is the text " <prompt>j" and the ids [j, 0]."""
    texts = texts or tuple(f" {prompt}{j}" for j in range(len(scores)))
    record = Record(prompt, responses=texts, scores=scores, origin=f"f:{prompt}", extra={"id": prompt})
    return Example(record, [9], ranked_ids=[[j, 0] for j in range(len(scores))])


def names(stage: list[Example]) -> list[tuple[str, str]]:
    return [(e.record.chosen.strip(), e.record.rejected.strip()) for e in stage]


def stages_of(examples, reference_logprobs=None, **options) -> list[list[tuple[str, str]]]:
    stages, _ = build_stages(examples, CurriculumConfig(**options), reference_logprobs)
    return [names(stage) for stage in stages]


FOUR = [ranked("a", 5, 1, 4, 2), ranked("b", 3, 7, 6.5, 1)]  # R1..R4 by score: a0 a2 a3 a1 and b1 b2 b0 b3


def test_four_ranked_responses_make_the_stages_of_curry_dpo():
    """Easy (R1, R4), medium (R1, R3), hard (R1, R2), as in the paper."""
    assert stages_of(FOUR, order="rank_gap") == [
        [("a0", "a1"), ("b1", "b3")],
        [("a0", "a3"), ("b1", "b0")],
        [("a0", "a2"), ("b1", "b2")],
    ]


def test_score_gaps_are_compared_across_prompts():
    # gaps: a 4 (a1), 1 (a2), 3 (a3); b 4 (b0), 0.5 (b2), 6 (b3); of equal gaps the first in the data
    assert stages_of(FOUR, order="score_gap") == [
        [("b1", "b3"), ("a0", "a1")],
        [("b1", "b0"), ("a0", "a3")],
        [("a0", "a2"), ("b1", "b2")],
    ]


def test_gaps_of_the_reference_are_signed():
    logprobs = [[-10.0, -13.0, -10.5, -2.0], [-5.0, -4.0, -30.0, -4.5]]
    # a0: over a1 3, a2 0.5, a3 -8; b1: over b0 1, b2 26, b3 0.5
    assert stages_of(FOUR, logprobs, order="reference_gap", num_stages=2) == [
        [("b1", "b2"), ("a0", "a1"), ("b1", "b0")],
        [("a0", "a2"), ("b1", "b3"), ("a0", "a3")],
    ]


def test_the_best_with_the_worst_alone():
    assert stages_of(FOUR, pairs="best_vs_worst", num_stages=1) == [[("b1", "b3"), ("a0", "a1")]]
    tied = [ranked("a", 1, 3, 2, 1, 3)]
    assert stages_of(tied, pairs="best_vs_worst", num_stages=1) == [[("a1", "a0")]]  # the first in the data


def test_all_pairs_are_every_two_of_unequal_score():
    rng = random.Random(0)
    examples = [ranked(f"p{i}-", *rng.choices([1, 2, 3, 4, 5], k=rng.randrange(2, 7))) for i in range(30)]
    expected = set()
    for example in examples:
        rows = zip(example.record.responses, example.record.scores, strict=True)
        for (a, high), (b, low) in combinations(sorted(rows, key=lambda row: -row[1]), 2):
            if high > low:
                expected.add((a.strip(), b.strip()))
    (pairs,) = stages_of(examples, pairs="all", num_stages=1)
    assert len(pairs) == len(expected)
    assert set(pairs) == expected


def test_a_pair_is_an_example_with_its_scores_stage_and_gap():
    stages, notes = build_stages(FOUR, CurriculumConfig(order="rank_gap"))
    pair = stages[1][1]
    assert pair.record == Record(
        "b",
        chosen=" b1",
        rejected=" b0",
        origin="f:b",
        extra={"id": "b", "chosen_score": 7, "rejected_score": 3, "stage": 1, "gap": 2.0},
    )
    assert (pair.query_ids, pair.chosen_ids, pair.rejected_ids) == ([9], [1, 0], [0, 0])
    assert (pair.completion_ids, pair.ranked_ids) == (None, [])
    assert notes == [
        "curriculum: 6 pairs of 2 prompts",
        "stage 0: 2 pairs, rank_gap 3 to 3",
        "stage 1: 2 pairs, rank_gap 2 to 2",
        "stage 2: 2 pairs, rank_gap 1 to 1",
    ]


def test_ties_make_no_pair_and_are_counted():
    examples = [ranked("a", 4, 7, 7, 4, 1), ranked("b", 3, 3), ranked("c", 2, 1, texts=(" same", " same "))]
    stages, notes = build_stages(examples, CurriculumConfig(num_stages=1, order="rank_gap"))
    assert names(stages[0]) == [("a1", "a4"), ("a1", "a0"), ("a1", "a3")]  # places 0 1 1 2 2, best first
    assert [e.record.extra["gap"] for e in stages[0]] == [2.0, 1.0, 1.0]
    assert notes[:4] == [
        "curriculum: 3 pairs of 1 prompts",
        "2 prompts make no pair",
        "2 pairs left out: equal scores",
        "1 pairs left out: chosen = rejected",
    ]
    worst, notes = build_stages(examples, CurriculumConfig(num_stages=1, pairs="best_vs_worst"))
    assert names(worst[0]) == [("a1", "a4")]
    assert "1 pairs left out: equal scores" in notes


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5, 7])
def test_stages_are_consecutive_parts_of_nearly_equal_size(num_stages):
    rng = random.Random(num_stages)
    examples = [ranked(f"p{i}-", *(rng.random() for _ in range(4))) for i in range(11)]
    config = CurriculumConfig(num_stages=num_stages, pairs="all")
    stages, _ = build_stages(examples, config)
    sizes = [len(stage) for stage in stages]
    assert sum(sizes) == 66 and max(sizes) - min(sizes) <= 1
    gaps = [[e.record.extra["gap"] for e in stage] for stage in stages]
    for easier, harder in zip(gaps, gaps[1:], strict=False):
        assert min(easier) >= max(harder)
    for index, stage in enumerate(stages):
        for e in stage:
            extra = e.record.extra
            assert extra["stage"] == index
            assert extra["gap"] == extra["chosen_score"] - extra["rejected_score"] > 0
    assert build_stages(examples, config)[0] == stages


def test_impossible_calls_are_refused():
    with pytest.raises(ValueError, match="num_stages must be >= 1, got 0"):
        CurriculumConfig(num_stages=0)
    with pytest.raises(DataError, match=r"6 pairs do not fill curriculum\.num_stages=7"):
        stages_of(FOUR, num_stages=7)


def test_the_demo_makes_a_curriculum():
    config = DataConfig(demo=DemoConfig(num_train=60, num_eval=5, num_ranked=5))
    tokenizer = byte_level()
    stages, _ = build_stages(load_examples(config, tokenizer, "ranked").train, CurriculumConfig())
    assert [len(stage) for stage in stages] == [80, 80, 80]
    for pair in stages[2]:
        assert pair.chosen_ids == encode_response(tokenizer, pair.record.chosen)
        assert pair.rejected_ids == encode_response(tokenizer, pair.record.rejected)


@pytest.mark.skipif(not FILE.is_file(), reason=f"no real TL;DR data at {FILE} (set DRPO_DATA)")
def test_real_ranked_summaries_make_every_pair_but_ties():
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").split("\n") if line]
    config = DataConfig(task="tldr", path=str(FILE), eval_fraction=0.0)
    splits = load_examples(config, single_bytes(), "ranked")
    assert len(splits.train) == sum(len(row["overall"]) >= 2 for row in rows) == 569
    assert "3 rows have a single response: no ranking" in splits.report
    expected = 0
    for row in rows:
        best = row["overall"].index(max(row["overall"]))
        for text, score in zip(row["summaries"], row["overall"], strict=True):
            expected += score < row["overall"][best] and text.strip() != row["summaries"][best].strip()
    stages, notes = build_stages(splits.train, CurriculumConfig())
    assert sum(map(len, stages)) == expected
    assert notes[0].startswith(f"curriculum: {expected} pairs of ")
