"""Runs without arithmetic: which tensors have numbers, and how their bytes are counted."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from drpo.models.probes import check_policy
from drpo.models.scoring import head_is_plain
from drpo.models.shared_prompt import can_share_prompt
from launch.planning.dry_run import MOST_REAL, DryRun


def test_weights_output_and_gradients_are_counted_by_hand():
    """float32: weight 3000 x 4000 and bias, then output 2 x 4000, then a gradient as large as the weights."""
    weights = 4 * (3000 * 4000 + 4000)
    with DryRun() as dry:
        with dry.measured() as made:
            layer = nn.Linear(3000, 4000)
        inputs = torch.ones(2, 3000)
        with dry.measured() as forward:
            outputs = layer(inputs)
        loss = outputs.sum()
        with dry.measured() as backward:
            loss.backward()
    assert (made.peak, made.left) == (weights, weights)
    assert (forward.peak, forward.left) == (4 * 2 * 4000, 4 * 2 * 4000)
    assert backward.left == weights


def test_peak_is_the_most_at_a_time_and_not_the_sum():
    with DryRun() as dry:
        with dry.measured() as outer:
            torch.empty(1000)
            torch.empty(3000)
            with dry.measured() as inner:
                kept = torch.empty(500)
        assert len(kept) == 500
    assert (outer.peak, outer.left) == (4 * 3000, 4 * 500)
    assert (inner.peak, inner.left) == (4 * 500, 4 * 500)


def test_memory_of_a_view_is_counted_once():
    with DryRun() as dry, dry.measured() as used:
        whole = torch.empty(100, 10)
        views = [whole.t(), whole[3:], whole.view(-1)]
    assert used.peak == 4 * 1000 and len(views) == 3


def test_ids_and_masks_are_real_and_select_in_unknown_numbers():
    with DryRun():
        mask = torch.tensor([[True, False, True], [True, True, False]])
        assert mask.sum().item() == 4 and mask.nonzero().tolist()[1] == [0, 2]
        hidden = nn.Embedding(10, 8)(torch.arange(6).view(2, 3))
        assert hidden[mask].shape == (4, 8)
        assert float(hidden.sum()) == 0.0 and not bool(hidden.norm() > 0.0)


def test_large_masks_are_without_numbers():
    with DryRun() as dry, dry.measured() as used:
        size = MOST_REAL + 1
        large = torch.arange(size) > 5
        assert large.shape == (size,)
        with pytest.raises(RuntimeError):
            large.nonzero()
    assert used.left == size


def test_conversion_of_a_module_keeps_tied_weights_tied():
    with DryRun() as dry:
        model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50, bias=False))
        model[1].weight = model[0].weight
        with dry.measured() as used:
            model.to(torch.bfloat16)
        assert model[1].weight is model[0].weight and model[0].weight.dtype == torch.bfloat16
    assert used.left == (2 - 4) * 50 * 16


@pytest.mark.parametrize("model_type", ["gpt_neox", "llama", "qwen3", "gemma2", "mistral"])
def test_probes_of_a_model_say_what_they_say_of_real_weights(model_type):
    """gemma2 caps its logits, so its head is not plain; a plan that missed it would forget whole logits."""
    real = tiny_model(model_type)
    with DryRun():
        dry = type(real)(real.config)
        check_policy(dry)
        answers = head_is_plain(dry), can_share_prompt(dry)
    assert answers == (head_is_plain(real), can_share_prompt(real))
