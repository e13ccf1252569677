"""The Bradley-Terry loss against hand-worked values and its gradient in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from drpo.preference_losses import bradley_terry_loss


def test_by_hand():
    # -log sigmoid(d) = log(1 + exp(-d)), so d = 0 gives log 2,
    # d = log 3 gives sigmoid 3/4, so log(4/3), and d = -log 3 gives sigmoid 1/4, so log 4.
    chosen = torch.tensor([1.5, math.log(3), 0.0])
    rejected = torch.tensor([1.5, 0.0, math.log(3)])
    expected = torch.tensor([math.log(2), math.log(4 / 3), math.log(4)])
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected), expected)


def test_only_the_difference_matters():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        bradley_terry_loss(chosen + 7, rejected + 7), bradley_terry_loss(chosen, rejected)
    )


def test_the_two_orders_are_the_two_outcomes():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    total = (-bradley_terry_loss(a, b)).exp() + (-bradley_terry_loss(b, a)).exp()
    torch.testing.assert_close(total, torch.ones(20, dtype=torch.float64))


def test_gradient_is_the_probability_of_the_wrong_order():
    generator = torch.Generator().manual_seed(2)
    chosen, rejected = (torch.randn(20, generator=generator, dtype=torch.float64) for _ in range(2))
    chosen.requires_grad_()
    rejected.requires_grad_()
    bradley_terry_loss(chosen, rejected).sum().backward()
    wrong = 1 / (1 + (chosen - rejected).detach().exp())
    torch.testing.assert_close(chosen.grad, -wrong)
    torch.testing.assert_close(rejected.grad, wrong)


@pytest.mark.parametrize(("difference", "expected"), [(1e4, 0.0), (-1e4, 1e4)])
def test_large_differences_stay_finite(difference, expected):
    chosen = torch.tensor([difference], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.zeros(1))
    loss.sum().backward()
    assert loss.item() == pytest.approx(expected) and chosen.grad.isfinite().all()
