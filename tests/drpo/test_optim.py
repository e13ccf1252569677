"""The optimizer and its learning rates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from drpo.optim import OptimConfig, build_optimizer, scheduled_rate, set_learning_rates


def test_an_adamw_step_by_hand():
    """Step 1 of AdamW: w <- (1 - lr wd) w - lr m^/(sqrt(v^) + eps), with m^ = g and v^ = g^2."""
    config = OptimConfig(learning_rate=0.1, weight_decay=0.5, betas=[0.7, 0.8], eps=1.0)
    weight = nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = build_optimizer([[weight]], config)
    weight.grad = torch.tensor([3.0, -1.0])
    optimizer.step()
    # 0.95 * 2 - 0.1 * 3 / 4 and 0.95 * -1 + 0.1 * 1 / 2
    torch.testing.assert_close(weight.detach(), torch.tensor([1.825, -0.9]))


def test_a_second_adamw_step_uses_both_decay_rates():
    config = OptimConfig(learning_rate=0.1, betas=[0.5, 0.75], eps=1e-8)
    weight = nn.Parameter(torch.tensor(0.0))
    optimizer = build_optimizer([[weight]], config)
    for gradient in (1.0, 3.0):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    # m = .5*.5*1 + .5*3 = 1.75, m^ = 1.75/.75; v = .75*.25*1 + .25*9 = 2.4375, v^ = 2.4375/.4375
    expected = -0.1 - 0.1 * (1.75 / 0.75) / (2.4375 / 0.4375) ** 0.5
    torch.testing.assert_close(weight.item(), expected)


def test_frozen_parameters_are_left_out_and_groups_kept():
    policy, critic = nn.Linear(2, 2), nn.Linear(2, 1)
    policy.weight.requires_grad_(False)
    optimizer = build_optimizer([policy.parameters(), critic.parameters()], OptimConfig())
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(policy.bias)],
        [id(critic.weight), id(critic.bias)],
    ]


def test_every_group_gets_its_own_rate():
    optimizer = build_optimizer([nn.Linear(1, 1).parameters(), nn.Linear(1, 1).parameters()], OptimConfig())
    set_learning_rates(optimizer, [0.25, 0.5])
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]
    with pytest.raises(ValueError):
        set_learning_rates(optimizer, [0.25])


@pytest.mark.parametrize(
    "schedule, warmup, expected",
    [
        ("linear", 0, [8.0, 6.0, 4.0, 2.0]),
        ("constant", 0, [8.0, 8.0, 8.0, 8.0]),
        ("cosine", 0, [8.0, 4 + 2 * 2**0.5, 4.0, 4 - 2 * 2**0.5]),
        ("constant", 1, [4.0, 8.0, 8.0, 8.0]),
        ("linear", 2, [8 / 3, 16 / 3, 8.0, 4.0]),
    ],
)
def test_scheduled_rates_of_four_steps(schedule, warmup, expected):
    config = OptimConfig(schedule=schedule, warmup_steps=warmup)
    rates = [scheduled_rate(8.0, config, step, 4) for step in range(4)]
    assert rates == pytest.approx(expected)


def test_another_warmup_in_place_of_the_configs():
    config = OptimConfig(schedule="constant", warmup_steps=3)
    assert scheduled_rate(6.0, config, 0, 10, warmup_steps=1) == 3.0
    assert scheduled_rate(6.0, config, 0, 10, warmup_steps=0) == 6.0
    assert scheduled_rate(6.0, config, 0, 10, warmup_steps=None) == 1.5


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0},
        {"warmup_steps": -1},
        {"betas": [0.9]},
        {"betas": [0.9, 1.0]},
        {"betas": [-0.1, 0.9]},
        {"max_grad_norm": 0.0},
        {"eps": -1e-8},
        {"weight_decay": -0.1},
    ],
)
def test_impossible_settings_name_the_key(wrong):
    with pytest.raises(ValueError, match=rf"^{next(iter(wrong))} must be "):
        OptimConfig(**wrong)
