"""Pairing two systems' responses, choosing prompts, and the orders that are asked."""

from __future__ import annotations

import random

import pytest

from drpo.data.records import DataError
from eval.completions.rows import CompletionRow, prompt_id_of
from eval.judging.matchup import first_prompts, pair_up, questions_of


def row(system: str, prompt: str, seed: int = 0, ended: bool = True) -> CompletionRow:
    text = f" {system} on {prompt} ({seed})"
    return CompletionRow(system, prompt_id_of(prompt), prompt, text, ended, 1, seed, f"ref of {prompt}")


def test_the_same_prompts_meet():
    rows = [row("x", "p"), row("y", "q", ended=False), row("y", "p"), row("x", "q"), row("z", "p")]
    first, second = pair_up(rows, "x", "y")
    assert (first.prompt, first.response_a, first.response_b) == ("p", " x on p (0)", " y on p (0)")
    assert (second.prompt, second.system_a, second.system_b) == ("q", "x", "y")
    assert (second.ended_a, second.ended_b, second.reference) == (True, False, "ref of q")
    assert first.shown("ab") == (" x on p (0)", " y on p (0)") == first.shown("ba")[::-1]


def test_one_baseline_response_meets_every_seed_and_several_meet_their_own():
    seeds = [row("x", "p", seed) for seed in (0, 1, 2)]
    made = pair_up([*seeds, row("y", "p", 7)], "x", "y")
    assert [(c.seed, c.response_b) for c in made] == [(s, " y on p (7)") for s in (0, 1, 2)]
    made = pair_up([*seeds, *(row("y", "p", seed) for seed in (2, 1, 0))], "x", "y")
    assert [c.response_b for c in made] == [f" y on p ({seed})" for seed in (0, 1, 2)]
    with pytest.raises(DataError, match="1 x no response of y with this seed"):
        pair_up([*seeds, row("y", "p", 0), row("y", "p", 1)], "x", "y")


def test_missing_responses_are_counted_on_both_sides():
    rows = [row("x", "p"), row("x", "q"), row("y", "p"), row("y", "r"), row("y", "s")]
    with pytest.raises(DataError) as error:
        pair_up(rows, "x", "y")
    assert "2 x no response of x" in str(error.value) and "1 x no response of y" in str(error.value)


def test_unknown_and_equal_systems_are_refused():
    rows = [row("x", "p"), row("y", "p")]
    with pytest.raises(DataError, match="there are: x, y"):
        pair_up(rows, "x", "w")
    with pytest.raises(DataError, match="both 'x'"):
        pair_up(rows, "x", "x")


def test_fewer_prompts_are_part_of_more_whatever_the_order_of_the_file():
    prompts = [f"prompt {i}" for i in range(40)]
    rows = [row(system, prompt) for prompt in prompts for system in ("x", "y")]
    shuffled = random.Random(1).sample(rows, len(rows))
    few, many = (
        {c.prompt for c in first_prompts(pair_up(made, "x", "y"), num)}
        for made, num in ((rows, 10), (shuffled, 20))
    )
    assert len(few) == 10 and len(many) == 20 and few < many


def test_both_orders_or_one_that_is_drawn_for_each_comparison():
    rows = [row(system, f"prompt {i}") for i in range(400) for system in ("x", "y")]
    made = pair_up(rows, "x", "y")
    both = questions_of(made, "both", 0)
    assert [q.order for q in both] == ["ab", "ba"] * 400
    one = questions_of(made, "one", 3)
    assert [q.matchup for q in one] == made
    share = sum(q.order == "ab" for q in one) / 400
    assert 0.4 < share < 0.6, "0.5 +- 4 standard deviations"
    assert one == questions_of(made, "one", 3) != questions_of(made, "one", 4)
    other = pair_up([row(s, f"prompt {i}") for i in range(400) for s in ("x", "z")], "x", "z")
    agree = sum(a.order == b.order for a, b in zip(one, questions_of(other, "one", 3), strict=True)) / 400
    assert 0.4 < agree < 0.6, "the order is not a property of the prompt"
