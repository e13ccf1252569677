from __future__ import annotations

import random

import pytest

from drpo.data.holdout import hold_out, is_held_out
from drpo.data.records import DataError, Record


def test_the_held_out_share_is_the_fraction_and_grows_by_inclusion():
    prompts = [f"p{i}" for i in range(20000)]
    held_out = {fraction: {p for p in prompts if is_held_out(p, fraction, 0)} for fraction in (0.0, 0.1, 0.3)}
    assert held_out[0.0] == set()
    assert held_out[0.1] < held_out[0.3]
    for fraction in (0.1, 0.3):  # four standard deviations of a binomial
        deviation = (20000 * fraction * (1 - fraction)) ** 0.5
        assert abs(len(held_out[fraction]) - 20000 * fraction) < 4 * deviation


def test_the_answer_depends_on_prompt_fraction_and_seed_alone():
    # sha256("3\nwhy?") begins with the bytes computed here; a change of the rule would move prompts between splits
    # of data sets in use.
    import hashlib

    share = int(hashlib.sha256(b"3\nwhy?").hexdigest()[:16], 16) / 16**16
    assert is_held_out("why?", share + 1e-9, 3)
    assert not is_held_out("why?", share - 1e-9, 3)


def test_records_of_one_prompt_stay_together_and_in_order():
    rng = random.Random(0)
    records = [Record(f"p{rng.randrange(30)}", origin=str(i)) for i in range(300)]
    train, held_out = hold_out(records, 0.3, 0)
    assert not {record.prompt for record in train} & {record.prompt for record in held_out}
    for part in (train, held_out):
        assert [int(record.origin) for record in part] == sorted(int(record.origin) for record in part)
    assert len(train) + len(held_out) == 300


def test_a_fraction_that_holds_out_nothing_is_an_error_and_zero_is_not():
    records = [Record("a"), Record("b")]
    with pytest.raises(DataError, match="eval_fraction=1e-09 of 2 distinct prompts"):
        hold_out(records, 1e-9, 0)
    assert hold_out(records, 0.0, 0) == (records, [])
