"""The masks of a batch of rollouts, by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hand_rollouts import hand_trajectory

from drpo.rollout.trajectory import Trajectory

T, F = True, False


@pytest.fixture
def trajectory() -> Trajectory:
    # from the prompt; from two of four tokens; from all but the last token of a full row; one token
    return hand_trajectory(lengths=[3, 4, 5, 1], forced=[0, 2, 4, 0], width=5, source_lengths=[0, 4, 9, 0])


def test_response_mask_covers_real_tokens(trajectory):
    assert trajectory.response_mask.tolist() == [
        [T, T, T, F, F],
        [T, T, T, T, F],
        [T, T, T, T, T],
        [T, F, F, F, F],
    ]
    assert trajectory.lengths.tolist() == [3, 4, 5, 1]


def test_action_mask_leaves_out_the_forced_prefix(trajectory):
    assert trajectory.action_mask.tolist() == [
        [T, T, T, F, F],
        [F, F, T, T, F],
        [F, F, F, F, T],
        [T, F, F, F, F],
    ]
    assert trajectory.action_mask.dtype == torch.bool


def test_a_token_is_forced_sampled_or_padding(trajectory):
    forced = torch.arange(5)[None, :] < trajectory.reset_lengths[:, None]
    padding = trajectory.response_mask.logical_not()
    kinds = forced.int() + trajectory.action_mask.int() + padding.int()
    assert bool((kinds == 1).all())


def test_is_reset(trajectory):
    assert trajectory.is_reset.tolist() == [F, T, T, F]


def test_batch_is_the_same_tensors(trajectory):
    assert torch.equal(trajectory.batch.responses, trajectory.responses)
    assert torch.equal(trajectory.batch.response_mask, trajectory.response_mask)
    assert torch.equal(trajectory.batch.query_mask, trajectory.query_mask)


def test_map_reaches_every_field_and_changes_nothing_in_place(trajectory):
    size = len(trajectory.scores)
    optional = {
        "trunk": torch.randn(size, 5, 3),
        "source_scores": torch.randn(size),
        "reward_details": torch.randn(size, 2),
        "engine_logprobs": torch.randn(size, 5),
    }
    trajectory = dataclasses.replace(trajectory, **optional)
    columns = {name: value for name, value in trajectory.columns().items() if isinstance(value, torch.Tensor)}
    others = {"rollouts_together", "reward_names", "continuations"}
    assert columns.keys() == trajectory.columns().keys() - others
    before = {name: value.clone() for name, value in columns.items()}
    twice = trajectory.map(lambda rows: torch.cat([rows, rows]))
    for name, rows in before.items():
        assert torch.equal(getattr(trajectory, name), rows)
        assert torch.equal(getattr(twice, name), torch.cat([rows, rows]))
    assert dataclasses.replace(trajectory, trunk=None).map(torch.clone).trunk is None
