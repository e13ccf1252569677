"""Random numbers by purpose: the same for the same key, others for every other, as they were in earlier versions."""

from __future__ import annotations

import itertools

import numpy as np

from drpo.random_streams import SeedOffset, Stream, stream


def test_numbers_depend_on_seed_purpose_and_key_alone():
    cases = list(itertools.product((0, 1), Stream, ((0,), (1,), (0, 1))))
    first = {case: stream(case[0], case[1], *case[2]).random() for case in cases}
    assert len(set(first.values())) == len(cases)
    for seed, purpose, key in reversed(cases):
        assert stream(seed, purpose, *key).random() == first[seed, purpose, key]


def test_no_two_purposes_share_numbers():
    assert len({int(purpose) for purpose in Stream}) == len(Stream.__members__)
    assert len({int(offset) for offset in SeedOffset}) == len(SeedOffset.__members__)


def test_runs_of_earlier_versions_are_reproduced():
    """Their literals: a run of theirs, or its resumption, has the same order, resets, tokens and evaluations."""
    earlier = {
        "RESETS": 1,
        "ORDER": 2,
        "MINIBATCHES": 3,
        "OWN_ROLLOUTS": 4,
        "SPREAD": 5,
        "SAMPLING": 0x5A3,
    }
    assert {purpose.name: int(purpose) for purpose in Stream} == earlier
    offsets = {"EVALUATION": 1_000_003, "CONTINUATIONS": 2_000_003, "INITIAL_POLICY": 3_000_017}
    assert {offset.name: int(offset) for offset in SeedOffset} == offsets
    expected = np.random.default_rng([7, 3, 2, 1]).permutation(8)
    assert (stream(7, Stream.MINIBATCHES, 2, 1).permutation(8) == expected).all()
